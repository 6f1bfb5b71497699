"""A prefix beside nn.MultiheadAttention, against torch's own forward with more keys and values to read.

Its weights are invertible here, so for each key and value of a prefix there is a token whose projection it is.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoRA, PrefixTuning, disabled, inject, merge
from lightning_peft.errors import ConfigError
from lightning_peft.prompting.multihead import PrefixedMultihead

BATCH, QUERIES, KEYS, WIDTH, HEADS, PREFIX = 3, 4, 5, 12, 2, 3
PADDING = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 1]]).bool()
CAUSAL = torch.ones(QUERIES, KEYS).triu(1).bool()

LAYERS: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "sequence first": {},
    "no bias": {"batch_first": True, "bias": False},
    "other keys": {"batch_first": True, "kdim": 14, "vdim": 13},
    "bias_kv": {"batch_first": True, "add_bias_kv": True},
    "zero": {"batch_first": True, "add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 14, "vdim": 13},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "boolean padding": {"key_padding_mask": PADDING},
    "padding to add": {"key_padding_mask": torch.zeros(BATCH, KEYS).double().masked_fill(PADDING, -2.5)},
    "boolean mask": {"attn_mask": CAUSAL, "need_weights": False},
    "mask to add": {"attn_mask": torch.zeros(QUERIES, KEYS).double().masked_fill(CAUSAL, float("-inf"))},
    "mask of each head": {"attn_mask": torch.linspace(-3, 3, BATCH * HEADS * QUERIES * KEYS).double().view(-1, 4, 5)},
    "both masks": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "average_attn_weights": False},
}


def _layer(**options: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def _prefixed(layer: nn.MultiheadAttention, *names: str) -> nn.MultiheadAttention:
    model = copy.deepcopy(layer)
    for name in names or ("default",):
        inject(model, PrefixTuning(num_virtual_tokens=PREFIX, init_std=1.0), name)
    return model


def _inputs(layer: nn.MultiheadAttention) -> list[Tensor]:
    sizes = [(QUERIES, WIDTH), (KEYS, layer.kdim), (KEYS, layer.vdim)]
    batch = (lambda length: (BATCH, length)) if layer.batch_first else (lambda length: (length, BATCH))
    return [torch.randn(*batch(length), width).double() for length, width in sizes]


def _reference(
    layer: nn.MultiheadAttention, model: nn.Module, inputs: list[Tensor], call: dict[str, Any], weights: int = -1
) -> tuple[Tensor, Tensor | None]:
    """Torch's forward with the prefixes of ``model`` as further tokens, and the weights of the others."""
    prefixes = [module.prefix.flat() for module in model.modules() if isinstance(module, PrefixedMultihead)]
    w_k, w_v = (
        layer.in_proj_weight.chunk(3)[1:] if layer._qkv_same_embed_dim else (layer.k_proj_weight, layer.v_proj_weight)
    )
    _, b_k, b_v = (0, 0, 0) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    query, key, value = inputs
    batched, dim = query.dim() == 3, int(layer.batch_first and query.dim() == 3)
    for keys, values in prefixes:
        tokens = (keys - b_k) @ torch.linalg.pinv(w_k).T, (values - b_v) @ torch.linalg.pinv(w_v).T
        if batched:
            tokens = tuple(x.unsqueeze(1 - dim).expand(*((BATCH, -1) if dim else (-1, BATCH)), -1) for x in tokens)
        key, value = torch.cat([tokens[0], key], dim), torch.cat([tokens[1], value], dim)
    more = key.shape[dim] - inputs[1].shape[dim]
    call = {k: nn.functional.pad(v, (more, 0)) if isinstance(v, Tensor) else v for k, v in call.items()}
    output, probabilities = layer(query, key, value, **call)
    return output, None if probabilities is None else probabilities[..., more:]


def _assert_equal(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", LAYERS)
def test_a_prefix_is_more_keys_and_values(options: str, call: str) -> None:
    layer = _layer(**LAYERS[options])
    model, inputs = _prefixed(layer), _inputs(layer)
    found = model(*inputs, **CALLS[call])
    _assert_equal(found, _reference(layer, model, inputs, CALLS[call]))
    assert not torch.allclose(found[0], layer(*inputs, **CALLS[call])[0])


@pytest.mark.parametrize("call", ["plain", "no weights", "weights of each head"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch(batch_first: bool, call: str) -> None:
    layer = _layer(batch_first=batch_first)
    model, inputs = _prefixed(layer), [torch.randn(n, WIDTH).double() for n in (QUERIES, KEYS, KEYS)]
    _assert_equal(model(*inputs, **CALLS[call]), _reference(layer, model, inputs, CALLS[call]))


@pytest.mark.parametrize("masks", [{"key_padding_mask": PADDING[1]}, {"attn_mask": CAUSAL}])
def test_masks_without_a_batch(masks: dict[str, Tensor]) -> None:
    layer = _layer()
    model, inputs = _prefixed(layer), [torch.randn(n, WIDTH).double() for n in (QUERIES, KEYS, KEYS)]
    _assert_equal(model(*inputs, **masks), _reference(layer, model, inputs, masks))


def test_arguments_by_position_and_by_name() -> None:
    layer = _layer(batch_first=True)
    model, (q, k, v) = _prefixed(layer), _inputs(layer)
    expected = model(q, k, v, key_padding_mask=PADDING, need_weights=False, attn_mask=CAUSAL)[0]
    torch.testing.assert_close(model(q, k, v, PADDING, False, CAUSAL)[0], expected)
    torch.testing.assert_close(
        model(value=v, key=k, query=q, need_weights=False, attn_mask=CAUSAL, key_padding_mask=PADDING)[0], expected
    )


def test_two_prefixes_are_one_of_both() -> None:
    layer = _layer(batch_first=True, add_bias_kv=True)
    model, inputs = _prefixed(layer, "a", "b"), _inputs(layer)
    call = CALLS["both masks"]
    _assert_equal(model(*inputs, **call), _reference(layer, model, inputs, call))


def test_lora_on_the_same_projection_is_in_force() -> None:
    layer = _layer(batch_first=True)
    model, inputs = copy.deepcopy(layer), _inputs(layer)
    inject(model, LoRA(r=4, target_modules=["in_proj", "out_proj"]), "lora")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    merged = copy.deepcopy(model)
    merge(merged, "lora")
    inject(model, PrefixTuning(num_virtual_tokens=PREFIX, init_std=1.0))
    found = model(*inputs)
    _assert_equal(found, _reference(merged, model, inputs, {}))
    assert not torch.allclose(found[0], _reference(layer, model, inputs, {})[0])
    found[0].sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_A" in name)


def test_dropout_acts_in_training_alone() -> None:
    layer = _layer(batch_first=True, dropout=0.5)
    model, inputs = _prefixed(layer), _inputs(layer)
    _assert_equal(model(*inputs), _reference(layer, model, inputs, {}))
    model.train()
    with_weights = model(*inputs)
    dropped = (with_weights[1] == 0).float().mean()
    assert 0 < dropped < 1
    assert not torch.equal(model(*inputs, need_weights=False)[0], model(*inputs, need_weights=False)[0])


def test_a_row_of_padding_alone_attends_to_the_prefix() -> None:
    layer = _layer(batch_first=True)
    model, inputs = _prefixed(layer), _inputs(layer)
    output, _ = model(*inputs, key_padding_mask=torch.ones(BATCH, KEYS).bool())
    assert output.isfinite().all()
    assert layer(*inputs, key_padding_mask=torch.ones(BATCH, KEYS).bool())[0].isnan().all()


def test_in_torchs_encoder_a_padded_row_is_what_it_is_alone() -> None:
    # eval and no_grad: torch would take its fused path, and pack padded rows into nested tensors
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 17, batch_first=True), 2).eval()
    inject(encoder, PrefixTuning(num_virtual_tokens=PREFIX, init_std=1.0))
    x = torch.randn(2, KEYS, WIDTH)
    with torch.no_grad():
        together = encoder(x, src_key_padding_mask=PADDING[:2])
        torch.testing.assert_close(together[1, :3], encoder(x[1:, :3])[0], rtol=1e-4, atol=1e-5)
        with disabled(encoder):
            assert not torch.allclose(together[0], encoder(x)[0])


def test_a_call_that_failed_leaves_nothing_for_the_next_one() -> None:
    model = _prefixed(_layer(batch_first=True))
    first, second = _inputs(model), _inputs(model)
    expected = model(*second)[0]
    with pytest.raises(RuntimeError, match="multiplied"):  # torch's own, of a query that is too narrow
        model(first[0][..., :6], *first[1:])
    torch.testing.assert_close(model(*second)[0], expected)


def test_causal_without_a_mask_is_refused_as_torch_does() -> None:
    layer = _layer(batch_first=True)
    model, inputs = _prefixed(layer), _inputs(layer)
    for attention, error in ((layer, RuntimeError), (model, ConfigError)):
        with pytest.raises(error, match="attn_mask"):
            attention(*inputs, need_weights=False, is_causal=True)
