"""BottleneckAdapter against the formulas of its papers: blocks of every kind, run by hand in plain torch."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from perturbation import perturb
from torch import Tensor, nn

from lightning_peft import BottleneckAdapter, disabled, inject

D = tiny_models.WIDTH
# join(kind of sublayer, its input x, its output h, the norm of a post-LN block) -> the stream behind it
Join = Callable[[str, Tensor, Tensor, nn.Module | None], Tensor]


@dataclass(frozen=True)
class Case:
    """A block of a model: how to run it, and the same by hand."""

    build: Callable[[], nn.Module]
    path: str
    run: Callable[[nn.Module, nn.Module, Tensor, Tensor], Any]
    """(block, model, x, memory) -> output."""
    by_hand: Callable[[Any, Any, Tensor, Tensor, Join], Tensor]
    kinds: tuple[str, ...] = ("attention", "ffn")


def _alone(block: nn.Module, model: nn.Module, x: Tensor, memory: Tensor) -> Any:
    return block(x)


def _with_memory(block: nn.Module, model: nn.Module, x: Tensor, memory: Tensor) -> Any:
    return block(x, memory) if isinstance(block, nn.TransformerDecoderLayer) else block(x, encoder_hidden_states=memory)


def _bert(block: Any, model: Any, x: Tensor, memory: Tensor, join: Join) -> Tensor:
    h = block.attention.output.dense(block.attention.self(x)[0])
    x = join("attention", x, h, block.attention.output.LayerNorm)
    return join("ffn", x, block.output.dense(block.intermediate(x)), block.output.LayerNorm)


def _gpt2(block: Any, model: Any, x: Tensor, memory: Tensor, join: Join) -> Tensor:
    x = join("attention", x, block.attn(block.ln_1(x))[0], None)
    return join("ffn", x, block.mlp(block.ln_2(x)), None)


def _rotary(model: Any, x: Tensor) -> Any:
    return model.model.rotary_emb(x, torch.arange(x.shape[1])[None])


def _llama(block: Any, model: Any, x: Tensor, memory: Tensor, join: Join) -> Tensor:
    h, _ = block.self_attn(block.input_layernorm(x), position_embeddings=_rotary(model, x), attention_mask=None)
    x = join("attention", x, h, None)
    return join("ffn", x, block.mlp(block.post_attention_layernorm(x)), None)


def _gemma(block: Any, model: Any, x: Tensor, memory: Tensor, join: Join) -> Tensor:
    """With a norm behind each sublayer too, whose output is h."""
    h, _ = block.self_attn(block.input_layernorm(x), position_embeddings=_local(model, x), attention_mask=None)
    x = join("attention", x, block.post_attention_layernorm(h), None)
    h = block.mlp(block.pre_feedforward_layernorm(x))
    return join("ffn", x, block.post_feedforward_layernorm(h), None)


def _local(model: Any, x: Tensor) -> Any:
    return model.model.rotary_emb(x, torch.arange(x.shape[1])[None], "sliding_attention")


def _t5(block: Any, model: Any, x: Tensor, memory: Tensor, join: Join) -> Tensor:
    first, *cross, last = block.layer
    x = join("attention", x, first.SelfAttention(first.layer_norm(x))[0], None)
    for layer in cross:
        h = layer.EncDecAttention(layer.layer_norm(x), key_value_states=memory)[0]
        x = join("cross-attention", x, h, None)
    return join("ffn", x, last.DenseReluDense(last.layer_norm(x)), None)


def _bart(block: Any, model: Any, x: Tensor, memory: Tensor, join: Join) -> Tensor:
    x = join("attention", x, block.self_attn(x)[0], block.self_attn_layer_norm)
    x = join("cross-attention", x, block.encoder_attn(x, key_value_states=memory)[0], block.encoder_attn_layer_norm)
    return join("ffn", x, block.fc2(F.gelu(block.fc1(x))), block.final_layer_norm)


def _torch(block: Any, model: Any, x: Tensor, memory: Tensor, join: Join) -> Tensor:
    cross, pre = isinstance(block, nn.TransformerDecoderLayer), block.norm_first

    def entered(norm: nn.Module) -> Tensor:
        return norm(x) if pre else x

    z = entered(block.norm1)
    x = join("attention", x, block.self_attn(z, z, z)[0], None if pre else block.norm1)
    if cross:
        h = block.multihead_attn(entered(block.norm2), memory, memory)[0]
        x = join("cross-attention", x, h, None if pre else block.norm2)
    norm = block.norm3 if cross else block.norm2
    return join("ffn", x, block.linear2(F.relu(block.linear1(entered(norm)))), None if pre else norm)


def _layer(kind: type[nn.Module], pre: bool) -> Callable[[], nn.Module]:
    return lambda: kind(D, 2, 24, batch_first=True, norm_first=pre)


_BOTH = ("attention", "cross-attention", "ffn")
CASES = {
    "bert": Case(tiny_models.bert, "bert.encoder.layer.1", _alone, _bert),
    "gpt2": Case(tiny_models.gpt2, "transformer.h.1", _alone, _gpt2),
    "llama": Case(
        tiny_models.llama,
        "model.layers.0",
        lambda block, model, x, _: block(x, position_embeddings=_rotary(model, x)),
        _llama,
    ),
    "gemma3": Case(
        tiny_models.gemma3,
        "model.layers.0",
        lambda block, model, x, _: block(x, position_embeddings=_local(model, x)),
        _gemma,
    ),
    "t5_encoder": Case(tiny_models.t5, "encoder.block.0", _alone, _t5),
    "t5_decoder": Case(tiny_models.t5, "decoder.block.0", _with_memory, _t5, _BOTH),
    "bart_decoder": Case(tiny_models.bart, "model.decoder.layers.1", _with_memory, _bart, _BOTH),
    "torch_post": Case(_layer(nn.TransformerEncoderLayer, False), "", _alone, _torch),
    "torch_pre": Case(_layer(nn.TransformerEncoderLayer, True), "", _alone, _torch),
    "torch_decoder_post": Case(_layer(nn.TransformerDecoderLayer, False), "", _with_memory, _torch, _BOTH),
    "torch_decoder_pre": Case(_layer(nn.TransformerDecoderLayer, True), "", _with_memory, _torch, _BOTH),
}

# Each with its non-linearity, its scale, and the reduction that is used here.
PRESETS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "houlsby": (F.silu, 1.0),
    "pfeiffer": (F.relu, 1.0),
    "parallel": (F.relu, 4.0),
    "adapter_plus": (F.gelu, 1.0),
}
EVERYWHERE = {"after_attention": True, "after_ffn": True}
_M = D // 4


def bottleneck_at(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """The bottlenecks of the block at ``path``, by the kind of their sublayer, which their slot is named after."""
    found = {}
    for name, module in model.get_submodule(path).named_modules():
        if name.endswith(".bottleneck"):
            slot = name.rpartition("peft.")[2].partition(".")[0]
            found[slot.partition(":")[2] or "ffn"] = module
    return found


def formula(preset: str, f: Callable[[Tensor], Tensor], x: Tensor, h: Tensor, ln: nn.Module | None) -> Tensor:
    """The stream behind a sublayer with an adapter f: post-LN if there is a norm ``ln``."""
    if preset == "houlsby":
        return x + h + f(h) if ln is None else ln(h + f(h) + x)
    if preset == "pfeiffer":
        return x + h + f(h + x) if ln is None else ln(h + f(ln(h + x)) + x)
    if preset == "parallel":
        return x + h + f(x) if ln is None else ln(h + f(x) + x)
    z = h + x if ln is None else ln(h + x)
    return z + f(z)


def _placed(case: Case, preset: str, where: dict[str, bool]) -> set[str]:
    """Kinds of sublayers that get an adapter, by the fields and what the papers say."""
    chosen = {"after_attention": preset == "houlsby", "after_ffn": True, **where}
    return {kind for kind in case.kinds if chosen.get(f"after_{kind.replace('-', '_')}", False)}


@pytest.mark.parametrize("where", [{}, EVERYWHERE, {"after_ffn": False, "after_attention": True}], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_a_block_computes_the_formula_of_the_paper(name: str, preset: str, where: dict[str, bool]) -> None:
    case = CASES[name]
    if "cross-attention" in case.kinds:
        where = {**where, "after_cross_attention": bool(where)}
    model = case.build().eval()
    base = copy.deepcopy(model)
    inject(model, BottleneckAdapter(preset=preset, reduction_factor=4, modules_to_save=None, **where))
    perturb(model)
    x, memory = torch.randn(2, 5, D), torch.randn(2, 3, D)
    adapters = bottleneck_at(model, case.path)
    assert adapters.keys() == _placed(case, preset, where)
    nonlinearity, scale = PRESETS[preset]

    def f(kind: str, z: Tensor) -> Tensor:
        """s · (W_up σ(W_down z + b) + b')."""
        a: Any = adapters[kind]
        assert a.down.weight.shape == (_M, D)
        s = a.scale if preset == "adapter_plus" else scale
        return s * (F.linear(nonlinearity(F.linear(z, a.down.weight, a.down.bias)), a.up.weight) + a.up.bias)

    def join(kind: str, x: Tensor, h: Tensor, norm: nn.Module | None) -> Tensor:
        if kind in adapters:
            return formula(preset, lambda z: f(kind, z), x, h, norm)
        return x + h if norm is None else norm(x + h)

    def plain(kind: str, x: Tensor, h: Tensor, norm: nn.Module | None) -> Tensor:
        return x + h if norm is None else norm(x + h)

    output = case.run(model.get_submodule(case.path), model, x, memory)
    found = output if isinstance(output, Tensor) else output[0]
    block = base.get_submodule(case.path)
    torch.testing.assert_close(found, case.by_hand(block, base, x, memory, join), rtol=1e-5, atol=1e-5)
    unadapted = case.by_hand(block, base, x, memory, plain)
    assert (found - unadapted).abs().max() > 1e-2
    with disabled(model):
        output = case.run(model.get_submodule(case.path), model, x, memory)
        torch.testing.assert_close(output if isinstance(output, Tensor) else output[0], unadapted)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_adapter_of_a_whole_model_acts_and_gets_a_gradient(preset: str) -> None:
    model = tiny_models.t5().eval()
    method = BottleneckAdapter(preset=preset, reduction_factor=4, after_cross_attention=True, **EVERYWHERE)
    report = inject(model, method)
    perturb(model)
    ids = torch.arange(1, 6)[None]
    model(input_ids=ids, labels=ids[:, :3]).loss.backward()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(name.endswith("down.weight") for name in own) == 2 * 2 + 2 * 3
    assert report.trainable == sum(p.numel() for p in own.values())
    assert not [name for name, p in own.items() if p.grad is None or not p.grad.any()]
