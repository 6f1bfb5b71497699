"""Looking at a block leaves no trace, wherever it is and whatever it does; what does not tell stays unknown."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import BottleneckAdapter, LoRA, PrefixTuning, inject
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.sublayers import find_sublayers

NEEDS_NORM = ["pfeiffer", "parallel", "adapter_plus"]


class Block(nn.Module):
    """A block that does whatever could leave a trace before its first norm or linear layer is called."""

    def __init__(self, pre: bool) -> None:
        super().__init__()
        self.pre, self.calls = pre, 0
        self.drop, self.batch_norm = nn.Dropout(0.5), nn.BatchNorm1d(8, affine=False)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        x = self.drop(x) + torch.rand_like(x) + self.batch_norm(x.transpose(1, 2)).transpose(1, 2)
        z = self.norm1(x) if self.pre else x
        x = x + self.attn(z, z, z)[0]
        x = x if self.pre else self.norm1(x)
        x = x + self.down(self.up(self.norm2(x) if self.pre else x).relu())
        return x if self.pre else self.norm2(x)


def _assert_no_trace(model: nn.Module) -> list[Any]:
    before, state = Snapshot(model), torch.get_rng_state()
    grads = {name: p.grad for name, p in model.named_parameters()}
    found = find_sublayers(model)
    assert torch.equal(torch.get_rng_state(), state)
    if not any(p.is_meta for p in model.parameters()):
        before.assert_same(model)
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pre", [True, False])
def test_looking_leaves_no_trace_whatever_the_block_does(pre: bool, training: bool) -> None:
    model = nn.ModuleDict({"block": Block(pre)}).train(training)
    seen: list[str] = []
    model["block"].attn.register_forward_pre_hook(lambda module, args: seen.append("user's hook"))
    model["block"].norm1.register_forward_hook(lambda module, args, output: seen.append("user's hook"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = _assert_no_trace(model)
    assert [(s.norm, s.pre) for s in found] == [("block.norm1", pre), ("block.norm2", pre)]
    assert model["block"].calls == 0
    assert not seen


@pytest.mark.parametrize("name", ["bert", "deberta", "llama", "gemma3", "t5", "bart", "whisper", "vit"])
def test_looking_at_a_model_of_transformers_leaves_no_trace(name: str) -> None:
    _assert_no_trace(getattr(tiny_models, name)().train())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "whisper"])
def test_the_dtype_makes_no_difference(name: str, dtype: torch.dtype) -> None:
    model = getattr(tiny_models, name)()
    assert _assert_no_trace(model.to(dtype)) == find_sublayers(model.float())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma3", "t5", "bart", "whisper", "vit"])
def test_a_model_without_weights_tells_the_same(name: str) -> None:
    build: Callable[[], nn.Module] = getattr(tiny_models, name)
    with torch.device("meta"):
        model = build()
    found = _assert_no_trace(model)
    assert found == find_sublayers(build())
    inject(model, BottleneckAdapter(preset="parallel", reduction_factor=4))
    assert all(p.is_meta for p in model.parameters())


def test_adapters_that_are_there_already_change_nothing() -> None:
    for build in (tiny_models.bert, tiny_models.llama):
        model = build()
        plain = find_sublayers(model)
        inject(model, LoRA(r=2), "a")
        inject(model, BottleneckAdapter(preset="pfeiffer", reduction_factor=4, layer_norm="before", gating=True), "b")
        inject(model, PrefixTuning(num_virtual_tokens=2, prefix_projection=True, gating=True), "c")
        assert _assert_no_trace(model) == plain


def test_a_block_in_a_model_whose_tensors_are_frozen_or_of_inference_mode() -> None:
    with torch.inference_mode():
        model = tiny_models.llama()
        assert find_sublayers(model) == find_sublayers(tiny_models.llama().requires_grad_(False))


class Odd(Block):
    """A block that cannot be started: it wants an argument of its own before it calls anything."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask.sum())


def test_a_block_that_cannot_be_started_tells_no_norm_and_still_takes_houlsby() -> None:
    model = nn.ModuleDict({"block": Odd(pre=True)}).eval()
    assert {s.pre for s in _assert_no_trace(model)} == {None}
    before = Snapshot(model)
    for preset in NEEDS_NORM:
        with pytest.raises(
            NotApplicableError, match=r"where the norm of 'block\.attn|down' is, .* Use preset='houlsby'"
        ):
            inject(model, BottleneckAdapter(preset=preset))
        before.assert_same(model)
    x, mask = torch.zeros(1, 2, 8), torch.zeros(2)
    torch.manual_seed(0)
    expected = model["block"](x, mask)
    inject(model, BottleneckAdapter(width=2, init="mam"))
    torch.manual_seed(0)
    torch.testing.assert_close(model["block"](x, mask), expected, rtol=1e-5, atol=1e-6)


def mixture() -> nn.Module:
    """The last layer of the feedforward part says how much the shared expert counts."""
    experts = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "num_experts": 4}
    return hf.Qwen2MoeModel(
        hf.Qwen2MoeConfig(
            **tiny_models.SIZES, **tiny_models.TOKENS, **experts, num_experts_per_tok=2, num_key_value_heads=1
        )
    )


@pytest.mark.parametrize("preset", NEEDS_NORM)
def test_where_the_structure_does_not_tell_the_norm_nothing_is_guessed(preset: str) -> None:
    model = mixture()
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=r"has to know where the norm|finds no transformer"):
        inject(model, BottleneckAdapter(preset=preset, reduction_factor=4))
    before.assert_same(model)


def test_a_mixture_of_experts_is_refused_and_its_block_can_be_named() -> None:
    model = mixture().eval()
    ids = torch.arange(1, 6)[None]
    expected = model(input_ids=ids).last_hidden_state
    with pytest.raises(NotApplicableError, match=r"after_ffn=True\) finds no"):
        inject(model, BottleneckAdapter(reduction_factor=4))
    inject(model, BottleneckAdapter(reduction_factor=4, target_modules=r"layers\.\d", init="bert"))
    assert (model(input_ids=ids).last_hidden_state - expected).abs().max() > 1e-4
