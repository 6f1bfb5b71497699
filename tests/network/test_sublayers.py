"""Where each sublayer of a block reads the stream and ends, and which norm it has."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import tiny_models
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft.network.sublayers import Sublayer, find_sublayers

D = tiny_models.WIDTH
SIZES = {**tiny_models.SIZES, **tiny_models.TOKENS}


def opt(**fields: Any) -> nn.Module:
    small = {"ffn_dim": 24, "word_embed_proj_dim": D, "dropout": 0.0, "init_std": 0.2}
    return hf.OPTModel(hf.OPTConfig(**{**SIZES, **small, **fields}))


def gptj() -> nn.Module:
    return hf.GPTJModel(hf.GPTJConfig(n_embd=D, n_layer=2, n_head=2, vocab_size=40, n_positions=20, rotary_dim=4))


def gpt_neox(parallel: bool) -> nn.Module:
    return hf.GPTNeoXModel(hf.GPTNeoXConfig(**SIZES, use_parallel_residual=parallel))


def phi3() -> nn.Module:
    return hf.Phi3Model(hf.Phi3Config(**SIZES, num_key_value_heads=1))


class Wrapped(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_models.bert()

    def forward(self, input_ids: Tensor) -> Any:
        return self.net(input_ids=input_ids)


def encoder(pre: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=pre)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)


def transformer(pre: bool) -> nn.Module:
    layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True, norm_first=pre)
    decoder = nn.TransformerDecoder(layer, 2)
    return nn.Transformer(8, custom_encoder=encoder(pre), custom_decoder=decoder, batch_first=True)


def _tokens(prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}input_ids": torch.arange(1, 11).view(2, 5)}


def _both() -> dict[str, Tensor]:
    return {**_tokens(), **_tokens("decoder_")}


def _two() -> dict[str, Tensor]:
    return {"src": torch.randn(2, 5, 8), "tgt": torch.randn(2, 3, 8)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    **{name: (getattr(tiny_models, name), _tokens) for name in ("bert", "roberta", "distilbert", "deberta", "gpt2")},
    **{name: (getattr(tiny_models, name), _tokens) for name in ("llama", "qwen3", "gemma3", "mistral", "clip_text")},
    **{name: (getattr(tiny_models, name), _both) for name in ("t5", "bart")},
    "whisper": (tiny_models.whisper, lambda: {"input_features": torch.randn(2, 8, 16), **_tokens("decoder_")}),
    "vit": (tiny_models.vit, lambda: {"pixel_values": torch.randn(2, 3, 8, 8)}),
    "bert_decoder": (
        partial(tiny_models.bert, hf.BertModel, is_decoder=True, add_cross_attention=True),
        lambda: {**_tokens(), "encoder_hidden_states": torch.randn(2, 3, D)},
    ),
    "opt_pre": (partial(opt, do_layer_norm_before=True), _tokens),
    "opt_post": (partial(opt, do_layer_norm_before=False), _tokens),
    "gpt_neox_in_turn": (partial(gpt_neox, False), _tokens),
    "phi3": (phi3, _tokens),
    "lightning": (Wrapped, _tokens),
    "encoder_pre": (partial(encoder, True), lambda: {"src": torch.randn(2, 5, 8)}),
    "encoder_post": (partial(encoder, False), lambda: {"src": torch.randn(2, 5, 8)}),
    "transformer_pre": (partial(transformer, True), _two),
    "transformer_post": (partial(transformer, False), _two),
}


def assert_adds_up(model: nn.Module, run: Callable[[], Any]) -> None:
    """Run the model, and check x + h of every sublayer against what its norm reads, or what comes behind it."""
    found = find_sublayers(model.eval())
    assert found
    assert all(s.pre is not None for s in found)
    entered: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    handles = []
    for path in {path for s in found for path in (s.block, s.source, s.output, s.norm)}:

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            entered.setdefault(path, args[0] if args else next(iter(kwargs.values())))

        def leave(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            left.setdefault(path, output[0] if isinstance(output, tuple) else output)

        handles.append(model.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(model.get_submodule(path).register_forward_hook(leave))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    for i, s in enumerate(found):
        x = entered[(s.norm or s.source) if s.pre else s.source]
        if not s.pre:
            behind = entered[s.norm]
        else:
            behind = left[s.block] if s.last else entered[found[i + 1].norm or found[i + 1].source]
        torch.testing.assert_close(behind.reshape(x.shape), x + left[s.output], rtol=1e-4, atol=1e-4, msg=str(s))


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_behind_a_sublayer_is_what_entered_it_and_its_output(name: str) -> None:
    build, inputs = MODELS[name]
    model = build()
    assert_adds_up(model, lambda: model(**inputs()))


@pytest.mark.parametrize("name", MODELS)
def test_every_block_has_its_sublayers_in_order_with_a_norm_each(name: str) -> None:
    model = MODELS[name][0]()
    found = find_sublayers(model)
    blocks: dict[str, list[Sublayer]] = {}
    for s in found:
        blocks.setdefault(s.block, []).append(s)
    assert len(blocks) == 2 if name not in ("t5", "bart", "whisper", "transformer_pre", "transformer_post") else 4
    for path, sublayers in blocks.items():
        kinds = [s.kind for s in sublayers]
        assert kinds in (["attention", "ffn"], ["attention", "cross-attention", "ffn"])
        assert [s.last for s in sublayers] == [False] * (len(kinds) - 1) + [True]
        assert len({s.norm for s in sublayers}) == len({s.output for s in sublayers}) == len(kinds)
        assert len({s.pre for s in sublayers}) == 1
        for s in sublayers:
            assert all(p.startswith(f"{path}.") for p in (s.source, s.output, s.norm))
            assert s.width == model.get_submodule(s.norm).weight.numel()


def _rows(found: list[Sublayer], path: str) -> list[tuple[Any, ...]]:
    return [
        (s.kind, *(p.removeprefix(f"{path}.") for p in (s.source, s.output, s.norm)), s.pre)
        for s in found
        if s.block == path
    ]


EXPECTED = {
    "bert": (
        "bert.encoder.layer.1",
        ("attention", "attention", "attention.output.dense", "attention.output.LayerNorm", False),
        ("ffn", "intermediate.dense", "output.dense", "output.LayerNorm", False),
    ),
    "gpt2": (
        "transformer.h.0",
        ("attention", "attn", "attn.c_proj", "ln_1", True),
        ("ffn", "mlp.c_fc", "mlp.c_proj", "ln_2", True),
    ),
    "gemma3": (  # the second norm's output joins the stream
        "model.layers.1",
        ("attention", "self_attn", "post_attention_layernorm", "input_layernorm", True),
        ("ffn", "mlp.gate_proj", "post_feedforward_layernorm", "pre_feedforward_layernorm", True),
    ),
    "t5": (
        "decoder.block.1",
        ("attention", "layer.0.SelfAttention", "layer.0.SelfAttention.o", "layer.0.layer_norm", True),
        ("cross-attention", "layer.1.EncDecAttention", "layer.1.EncDecAttention.o", "layer.1.layer_norm", True),
        ("ffn", "layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wo", "layer.2.layer_norm", True),
    ),
    "bart": (
        "model.decoder.layers.0",
        ("attention", "self_attn", "self_attn.out_proj", "self_attn_layer_norm", False),
        ("cross-attention", "encoder_attn", "encoder_attn.out_proj", "encoder_attn_layer_norm", False),
        ("ffn", "fc1", "fc2", "final_layer_norm", False),
    ),
    "whisper": (  # the same names as BART's
        "model.decoder.layers.0",
        ("attention", "self_attn", "self_attn.out_proj", "self_attn_layer_norm", True),
        ("cross-attention", "encoder_attn", "encoder_attn.out_proj", "encoder_attn_layer_norm", True),
        ("ffn", "fc1", "fc2", "final_layer_norm", True),
    ),
    "opt_post": (
        "decoder.layers.0",
        ("attention", "self_attn", "self_attn.out_proj", "self_attn_layer_norm", False),
        ("ffn", "fc1", "fc2", "final_layer_norm", False),
    ),
    "transformer_pre": (
        "decoder.layers.1",
        ("attention", "self_attn", "self_attn", "norm1", True),
        ("cross-attention", "multihead_attn", "multihead_attn", "norm2", True),
        ("ffn", "linear1", "linear2", "norm3", True),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_places_are_those_of_the_block(name: str) -> None:
    path, *rows = EXPECTED[name]
    assert _rows(find_sublayers(MODELS[name][0]()), path) == rows


def test_attention_and_feedforward_part_may_read_the_same_norm() -> None:
    rows = _rows(find_sublayers(gptj()), "h.1")
    assert rows == [
        ("attention", "attn", "attn.out_proj", "ln_1", True),
        ("ffn", "mlp.fc_in", "mlp.fc_out", "ln_1", True),
    ]
    rows = _rows(find_sublayers(gpt_neox(True)), "layers.0")
    assert [(row[3], row[4]) for row in rows] == [("input_layernorm", True), ("post_attention_layernorm", True)]


def test_a_network_without_blocks_has_none() -> None:
    assert find_sublayers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))) == []


def olmo2() -> nn.Module:
    """The norms are at the end of each sublayer: x + LN(h)."""
    return hf.Olmo2Model(hf.Olmo2Config(**SIZES))


def glm4() -> nn.Module:
    """The norms are defined in another order than that of their use."""
    return hf.Glm4Model(hf.Glm4Config(**SIZES, num_key_value_heads=1, head_dim=8))


def gpt2_cross() -> nn.Module:
    """So are these."""
    return tiny_models.gpt2(hf.GPT2Model, add_cross_attention=True)


def albert() -> nn.Module:
    """The attention's norm is beside the projections; one block is all layers."""
    return hf.AlbertModel(hf.AlbertConfig(**SIZES, embedding_size=8, hidden_dropout_prob=0.0))


def modernbert() -> nn.Module:
    """The first layer's attention has no norm."""
    return hf.ModernBertModel(hf.ModernBertConfig(**SIZES))


@pytest.mark.parametrize("build", [olmo2, glm4, gpt2_cross, albert, modernbert])
def test_the_order_of_definition_is_not_what_counts(build: Callable[[], nn.Module]) -> None:
    model = build()
    inputs = {**_tokens(), **({"encoder_hidden_states": torch.randn(2, 3, D)} if build is gpt2_cross else {})}
    assert_adds_up(model, lambda: model(**inputs))
