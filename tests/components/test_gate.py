"""A gate: one number for each sequence, the mean over its positions of sigmoid(w x + b)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import LoRA, PrefixTuning, disabled, inject, merge
from lightning_peft.components.gate import Gate, InputGate
from lightning_peft.errors import ConfigError, NotApplicableError, NotMergeableError


def gate(features: int = 4, **fields: Any) -> Gate:
    made = Gate(features, torch.zeros(1), **fields)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made


def by_hand(g: Gate, x: Tensor) -> Tensor:
    """The gate of one sequence (positions, features)."""
    return torch.sigmoid((x * g.weight[0]).sum(-1) + g.bias[0]).mean()


def test_each_sequence_has_its_own() -> None:
    g, x = gate(), torch.randn(3, 5, 4)
    found = g(x)
    assert found.shape == (3, 1, 1)
    torch.testing.assert_close(found.flatten(), torch.stack([by_hand(g, row) for row in x]))


def test_the_sequences_may_be_counted_by_the_second_dimension() -> None:
    g, x = gate(batch_dim=1), torch.randn(5, 3, 4)
    found = g(x)
    assert found.shape == (1, 3, 1)
    torch.testing.assert_close(found.flatten(), torch.stack([by_hand(g, x[:, i]) for i in range(3)]))


def test_every_place_of_an_image_is_a_position() -> None:
    g, x = gate(), torch.randn(3, 5, 6, 4)
    assert g(x).shape == (3, 1, 1, 1)
    torch.testing.assert_close(g(x).flatten(), torch.stack([by_hand(g, row.flatten(0, 1)) for row in x]))


def test_a_row_without_positions_is_a_sequence_by_itself() -> None:
    """As behind a pooler: a mean over the rows would let those of one batch see each other."""
    g, x = gate(), torch.randn(3, 4)
    assert g(x).shape == (3, 1)
    torch.testing.assert_close(g(x).flatten(), torch.stack([by_hand(g, row[None]) for row in x]))
    assert g(x[0]).shape == (1,)


def test_it_starts_near_a_half() -> None:
    fresh = Gate(64, torch.zeros(1))
    assert not fresh.bias.any()
    assert fresh.weight.any()
    assert (fresh(torch.randn(8, 5, 64)) - 0.5).abs().max() < 0.2


def test_it_follows_the_dtype_of_its_input() -> None:
    g = gate()
    assert g(torch.randn(2, 5, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert g.weight.dtype == torch.float32


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_gate_of_an_input_is_in_the_order_of_the_batch(batch_first: bool) -> None:
    g, x = gate(), torch.randn(3, 5, 4)
    rows = x if batch_first else x.transpose(0, 1)
    adapter = InputGate(g, int(not batch_first))
    torch.testing.assert_close(adapter(rows).flatten(), torch.stack([by_hand(g, row) for row in x]))
    one = adapter(rows[:, 0] if batch_first else x[0])  # one sequence without a batch
    assert one.shape == (1, 1)
    torch.testing.assert_close(one[0, 0], by_hand(g, rows[:, 0] if batch_first else x[0]))


# The gate of LoRA ----------------------------------------------------------------------------------------------------


def _lora(**fields: Any) -> tuple[Any, Any]:
    model = nn.ModuleDict({"fc": nn.Linear(4, 6)})
    inject(model, LoRA(r=2, alpha=6, target_modules=["fc"], gating=True, **fields))
    adapter = model["fc"].peft.default
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return model, adapter


def test_the_gate_of_a_lora_scales_its_update() -> None:
    model, a = _lora()
    x = torch.randn(3, 5, 4)
    base = nn.functional.linear(x, model["fc"].weight, model["fc"].bias)
    g = torch.stack([by_hand(a.gate, row) for row in x])[:, None, None]
    torch.testing.assert_close(model["fc"](x), base + g * 3 * x @ a.lora_A.T @ a.lora_B.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model["fc"](x[0])[:1], model["fc"](x[0, :1]))  # rows of a batch stay apart


def test_the_gate_of_a_lora_sees_the_input_before_dropout() -> None:
    model, a = _lora(dropout=0.5)
    x = torch.randn(3, 5, 4)
    model.train()
    torch.manual_seed(1)
    found = model["fc"](x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(x, 0.5)
    base = nn.functional.linear(x, model["fc"].weight, model["fc"].bias)
    torch.testing.assert_close(found, base + a.gate(x) * 3 * kept @ a.lora_A.T @ a.lora_B.T, rtol=1e-4, atol=1e-4)


def test_a_gated_lora_starts_as_its_base_trains_its_gate_and_cannot_be_merged() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 6)})
    x = torch.randn(3, 5, 4)
    expected = model["fc"](x)
    inject(model, LoRA(r=2, target_modules=["fc"], gating=True))
    torch.testing.assert_close(model["fc"](x), expected, rtol=1e-5, atol=1e-6)
    nn.init.normal_(model["fc"].peft.default.lora_B)
    model["fc"](x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model["fc"].peft.parameters())
    acting = model["fc"](x)
    with pytest.raises(NotMergeableError, match="no change of its host's weights"):
        merge(model)
    assert torch.equal(model["fc"](x), acting)
    with disabled(model):
        torch.testing.assert_close(model["fc"](x), expected)


@pytest.mark.parametrize(
    "module", [nn.Conv2d(3, 4, 1), nn.Embedding(3, 4), nn.MultiheadAttention(4, 2)], ids=lambda m: type(m).__name__
)
def test_a_lora_without_a_vector_of_features_to_read_cannot_be_gated(module: nn.Module) -> None:
    model = nn.ModuleDict({"m": module})
    with pytest.raises(NotApplicableError, match=r"LoRA\.gating cannot act on 'm"):
        inject(model, LoRA(r=2, target_modules=".*", gating=True))
    assert "peft" not in module._modules


@pytest.mark.parametrize("method", [LoRA, PrefixTuning])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_gating_is_true_or_false(method: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{method.__name__}\.gating must be true or false"):
        method(gating=value)
