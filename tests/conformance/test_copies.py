"""Copies, pickles and files of an adapted model."""

import copy
import io
import pickle
from collections.abc import Callable

import torch
from conformance.cells import Cell, perturb
from snapshot import Snapshot, assert_identical
from torch import nn

from lightning_peft import remove
from lightning_peft.checkpoints.ckpt import adapter_state

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def test_a_copy_computes_the_same_and_is_independent(cell: Cell) -> None:
    original = cell.trained().eval()
    for how, copied in COPIES.items():
        expected = cell.bits(original)
        duplicate = copied(original)
        assert_identical(cell.bits(duplicate), expected, how)

        perturb(duplicate)
        changed = cell.bits(duplicate)
        assert not torch.equal(changed, expected), f"{how}: the copy does not use its own adapter"
        assert_identical(cell.bits(original), expected, f"original of {how}")

        perturb(original)
        assert not torch.equal(cell.bits(original), expected), f"{how}: the original uses the copy's adapter"
        assert_identical(cell.bits(duplicate), changed, how)


def test_an_adapter_is_removed_from_a_copy_without_a_trace(cell: Cell) -> None:
    base = cell.base()
    before = Snapshot(base)
    original = cell.trained(base)
    deepcopied, unpickled = (copied(original) for copied in COPIES.values())
    remove(deepcopied)
    before.assert_same(deepcopied, same_tensors=False)
    remove(unpickled)
    before.assert_same(unpickled, same_tensors=False)
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
    base_keys = set(cell.host.network().state_dict())
    model = cell.trained().eval()
    assert set(adapter_state(model)) == set(model.state_dict()) - base_keys, "the adapter's part is all that was added"
    fresh = cell.adapted().eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert_identical(cell.bits(fresh), cell.bits(model))
