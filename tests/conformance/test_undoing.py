"""Disabling, removing and merging, and several adapters beside each other."""

import pytest
import torch
from conformance.cells import Cell
from snapshot import Snapshot, assert_identical
from torch import nn

from lightning_peft import activate, active, active_adapters, disabled, merge, merged, remove
from lightning_peft.checkpoints.ckpt import adapter_state
from lightning_peft.errors import AdapterNameError, NotApplicableError, NotMergeableError


def test_a_disabled_adapter_leaves_exactly_the_base(cell: Cell) -> None:
    expected = cell.bits(cell.base().eval())
    model = cell.trained().eval()
    acting = cell.bits(model)
    with disabled(model):
        assert_identical(cell.bits(model), expected)
    assert_identical(cell.bits(model), acting)


def test_with_torchs_fused_attention_a_disabled_adapter_leaves_the_base(cell: Cell) -> None:
    with torch.inference_mode():
        expected = cell.run(cell.base().eval())
        model = cell.trained().eval()
        with disabled(model):
            torch.testing.assert_close(cell.run(model), expected, rtol=1e-5, atol=1e-6)


def test_removing_leaves_no_trace(cell: Cell) -> None:
    base = cell.base()
    next(base.parameters()).requires_grad_(False)  # what was frozen before stays frozen
    before = Snapshot(base)
    model = cell.adapted(base)
    cell.train(model)
    remove(model)
    before.assert_same(model)


def test_removing_one_of_two_adapters_leaves_the_other_as_it_was(cell: Cell) -> None:
    model = cell.trained(name="a").eval()
    alone = cell.bits(model)
    state = adapter_state(model)
    _second(cell, model)
    remove(model, "b")
    assert_identical(cell.bits(model), alone)
    assert list(adapter_state(model)) == list(state)


def test_merging_equals_the_unmerged_output_or_is_refused(cell: Cell) -> None:
    base = cell.base().eval()
    plain = Snapshot(base)
    model = cell.trained(base).eval()
    unmerged = cell.run(model)
    before = Snapshot(model)
    try:
        merge(model)
    except NotMergeableError as error:
        refusal = str(error)
        before.assert_same(model)
        assert_identical(cell.run(model), unmerged)
        pytest.skip(refusal or pytest.fail("a refusal without a reason"))
    torch.testing.assert_close(cell.run(model), unmerged, rtol=1e-5, atol=1e-5)
    after = Snapshot(model)
    assert list(after.state) == list(plain.state)
    for what in ("classes", "attributes", "hooks", "trains", "training", "identities"):
        assert getattr(after, what) == getattr(plain, what), what


def test_merging_for_a_while_restores_every_bit(cell: Cell) -> None:
    model = cell.trained().eval()
    unmerged = cell.run(model)
    before = Snapshot(model)
    refusal = None
    try:
        with merged(model):
            torch.testing.assert_close(cell.run(model), unmerged, rtol=1e-5, atol=1e-5)
            with pytest.raises(AdapterNameError, match="leave the merged"), disabled(model):
                pytest.fail("the base is not there now")
    except NotMergeableError as error:
        refusal = str(error)
    before.assert_same(model)
    assert_identical(cell.run(model), unmerged)
    if refusal is not None:
        pytest.skip(refusal or pytest.fail("a refusal without a reason"))


def test_of_two_adapters_each_alone_equals_a_model_that_has_only_that_one(cell: Cell) -> None:
    model = _second(cell, cell.trained(name="a").eval())
    assert active_adapters(model) == ("a", "b")
    both = cell.bits(model)
    state = adapter_state(model)
    alone = {}
    for name in ("a", "b"):
        single = cell.adapted(name=name).eval()
        own = {key: tensor for key, tensor in state.items() if f".peft.{name}" in f".{key}"}
        assert own.keys() == adapter_state(single).keys()
        single.load_state_dict(own)
        expected = cell.bits(single)
        with active(model, name):
            assert_identical(cell.bits(model), expected)
        activate(model, name)
        assert_identical(cell.bits(model), expected)
        assert {key for key, p in model.named_parameters() if p.requires_grad} <= own.keys()
        alone[name] = expected
    activate(model, "a", "b")
    assert_identical(cell.bits(model), both)
    assert not torch.equal(alone["a"], alone["b"])
    assert not torch.equal(both, alone["a"])
    activate(model)
    assert_identical(cell.bits(model), cell.bits(cell.base().eval()))


def _second(cell: Cell, model: nn.Module) -> nn.Module:
    """Add an adapter "b" of the same method to a model that has "a"; skips where a method allows one only."""
    before = Snapshot(model)
    try:
        return cell.trained(model, "b")
    except NotApplicableError as refusal:
        before.assert_same(model)
        pytest.skip(str(refusal))
