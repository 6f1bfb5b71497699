"""Copies, pickles and files of an adapted model."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from conformance.cells import Cell, perturb
from snapshot import Snapshot, assert_identical
from torch import nn

from lightning_peft import remove
from lightning_peft.core.checkpoint import adapter_state

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_the_same_and_is_independent(cell: Cell, how: str) -> None:
    original = cell.trained().eval()
    expected = cell.bits(original)
    duplicate = COPIES[how](original)
    assert_identical(cell.bits(duplicate), expected)

    perturb(duplicate)
    assert not torch.equal(cell.bits(duplicate), expected), "the copy does not use its own adapter"
    assert_identical(cell.bits(original), expected)

    changed = cell.bits(duplicate)
    perturb(original)
    assert not torch.equal(cell.bits(original), expected)
    assert_identical(cell.bits(duplicate), changed)


@pytest.mark.parametrize("how", COPIES)
def test_an_adapter_is_removed_from_a_copy_without_a_trace(cell: Cell, how: str) -> None:
    base = cell.base()
    before = Snapshot(base)
    original = cell.trained(base)
    duplicate = COPIES[how](original)
    remove(duplicate)
    before.assert_same(duplicate, same_tensors=False)
    remove(original)
    before.assert_same(original)


def test_a_state_dict_of_the_adapter_alone_loads_strictly_and_computes_the_same(cell: Cell) -> None:
    model = cell.adapted()
    cell.train(model)
    file = io.BytesIO()
    torch.save(adapter_state(model), file)
    file.seek(0)
    fresh = cell.adapted()
    perturb(fresh)  # what a fresh adapter happens to hold must not matter
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_identical(cell.bits(fresh.eval()), cell.bits(model.eval()))


def test_a_whole_state_dict_loads_strictly_and_computes_the_same(cell: Cell) -> None:
    model = cell.trained().eval()
    fresh = cell.adapted().eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert_identical(cell.bits(fresh), cell.bits(model))


def test_the_adapters_part_is_all_that_differs_from_the_base(cell: Cell) -> None:
    base_keys = set(cell.base().state_dict())
    model = cell.adapted()
    assert set(adapter_state(model)) == set(model.state_dict()) - base_keys
