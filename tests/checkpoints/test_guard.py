"""Bounds on what comes out of a file."""

from typing import Any

import pytest
import torch
from mutations import bomb, deep
from snapshot import Snapshot
from tiny_models import bert
from torch import nn

from lightning_peft import BottleneckAdapter, LoRA, Method, PrefixTuning, PromptTuning, PTuning, inject
from lightning_peft.checkpoints.guard import check_bounds, limit_allocation
from lightning_peft.errors import CheckpointError, PEFTError


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (deep(100), "'x' is nested more than"),
        (deep(100, lambda inner: {"a": (inner, 1)}), "'x' is nested more than"),
        (itself(), "'x' is nested more than"),
        (bomb(), "unfolds to more than .* lists"),
        (10**5000, "number under 'x' has over"),
        (-(10**5000), "number under 'x' has over"),
        ({1: {10**5000: 2}}, "number under 'x' has over"),
        (torch.zeros(1).expand(10**6, 10**6), r"tensor under 'x' of shape \[1000000, 1000000\] repeats"),
    ],
    ids=["lists", "mappings", "itself", "bomb", "number", "negative", "key", "tensor"],
)
def test_what_cannot_be_handled_is_refused(value, message):
    with pytest.raises(CheckpointError, match=message):
        check_bounds({"x": value})


def test_what_a_checkpoint_holds_passes():
    shared = {"r": 8}
    table = torch.zeros(4, 8)
    check_bounds(
        {"a": [shared] * 1000, "b": deep(40), "c": 2**128, "d": list(range(10**6)), "e": (1.5, None, "x", b"")}
    )
    check_bounds({"state_dict": {"a": table, "b": table[:, ::2], "c": table.expand(3, 4, 8), "d": table.to("meta")}})


@pytest.mark.parametrize(
    "method",
    [
        PrefixTuning(num_virtual_tokens=10**9),
        PrefixTuning(num_virtual_tokens=2**62),
        PrefixTuning(num_virtual_tokens=10**18),
        PrefixTuning(num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=10**9),
        PromptTuning(num_virtual_tokens=10**9),
        PromptTuning(num_virtual_tokens=10**9, init="random"),
        PTuning(num_virtual_tokens=10**9),
        PTuning(num_virtual_tokens=2, encoder_hidden_size=10**9),
        PTuning(num_virtual_tokens=2, encoder="lstm", encoder_hidden_size=1, encoder_num_layers=10**9),
        BottleneckAdapter(width=10**9),
        LoRA(r=10**9),
        LoRA(r=10**9, target_modules=["query"]),
    ],
    ids=str,
)
def test_adapters_larger_than_the_file_are_refused_before_they_are_made(method: Method):
    model = bert(max_position_embeddings=512)
    before = Snapshot(model)
    with pytest.raises((PEFTError, OverflowError, TypeError, RuntimeError)), limit_allocation(model, []):
        inject(model, method)
    before.assert_same(model)


@pytest.mark.parametrize(
    "method", [LoRA(r=4), PTuning(encoder="lstm", num_virtual_tokens=4), BottleneckAdapter(width=4)]
)
def test_adapters_as_large_as_the_file_are_made(method: Method):
    first, second = bert(), bert()
    inject(first, method)
    state = {key: tensor for key, tensor in first.state_dict().items() if ".peft." in key}
    with limit_allocation(second, state.values()):
        inject(second, method)
    assert {key for key in second.state_dict() if ".peft." in key} == state.keys()


def test_the_largest_file_is_bounded_by_its_own_size():
    model, tensors = nn.Sequential(nn.Linear(8, 8)), [torch.zeros(1000), "no tensor"]
    with limit_allocation(model, tensors):
        torch.zeros(1000, 60)
        torch.zeros(600).split([100, 200, 300])  # sizes of pieces, and not of something new
        with pytest.raises(CheckpointError, match="17000000 elements, more than the file holds"):
            torch.empty(17_000_000)
        with pytest.raises(CheckpointError, match="more than the file holds"):
            nn.LSTM(4, 4, num_layers=10**9)  # each tensor of it is small, all together are not
