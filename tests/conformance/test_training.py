"""What trains, what stays, and in which modes an adapter acts."""

import pytest
import torch
from conformance.cells import Cell, perturb
from snapshot import Snapshot, assert_identical

from lightning_peft import inject
from lightning_peft.checkpoints.ckpt import adapter_keys
from lightning_peft.errors import NotApplicableError


def test_a_fresh_adapter_leaves_the_output_as_it_was(cell: Cell) -> None:
    if not cell.method.starts_as_base:
        pytest.skip(f"{type(cell.method).__name__} does not start as its base")
    expected = cell.run(cell.base().eval())
    torch.testing.assert_close(cell.run(cell.adapted().eval()), expected, rtol=1e-5, atol=1e-6)


def test_only_the_adapters_own_parameters_train_and_each_gets_a_gradient_in_the_first_backward(cell: Cell) -> None:
    base_names = {name for name, _ in cell.host.network().named_parameters()}
    model = cell.adapted()
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training
    assert training.isdisjoint(base_names)
    assert training <= adapter_keys(model)
    assert all(".peft.default" in f".{name}" for name in training)
    gradients = cell.gradients(model)
    assert gradients.keys() == training, "a base parameter gets a gradient"
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def test_the_bases_keys_and_values_do_not_change_in_training(cell: Cell) -> None:
    base = cell.base()
    expected = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = cell.adapted(base)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    cell.train(model)
    state = model.state_dict()
    assert [key for key in state if ".peft." not in f".{key}"] == list(expected)
    for key, tensor in expected.items():
        assert_identical(state[key], tensor, key)
    moved = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert moved, "three optimizer steps changed no parameter"


def test_an_adapter_acts_in_eval_under_no_grad_and_in_inference_mode(cell: Cell) -> None:
    base = cell.run(cell.base().eval())
    model = cell.adapted(method=cell.without_saved_modules()).eval()
    perturb(model)
    with_grad = cell.run(model)
    with torch.no_grad():
        without_grad = cell.run(model)
    with torch.inference_mode():
        inference = cell.run(model).clone()
    assert (with_grad - base).abs().max() > 1e-4, "the adapter does nothing"
    torch.testing.assert_close(without_grad, with_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inference, with_grad, rtol=1e-5, atol=1e-6)


def test_a_refusal_says_why_and_leaves_the_model_as_it_was(refused_cell: Cell) -> None:
    base = refused_cell.base()
    before = Snapshot(base)
    with pytest.raises(NotApplicableError) as refusal:
        inject(base, refused_cell.method)
    assert str(refusal.value) == refused_cell.refusal
    assert len(refused_cell.refusal) > 40
    before.assert_same(base)
