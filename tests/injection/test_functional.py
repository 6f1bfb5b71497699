"""Adapters where there is no Trainer: in a plain torch loop, and inside ``torch.func``."""

import copy
from collections.abc import Callable

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_peft import LoRA, PrefixTuning, disabled, inject, remove
from lightning_peft.core.method import Method

Run = Callable[..., Tensor]


class Layers(nn.Module):
    """A Linear, an attention that reads its weights itself, a recurrent layer that lists them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.head(self.lstm(h + self.attention(h, h, h)[0])[0])


def layers(method: Method) -> tuple[nn.Module, tuple, dict]:
    return adapted(Layers(), method), (torch.randn(4, 5, 6),), {}


def bert(method: Method) -> tuple[nn.Module, tuple, dict]:
    return adapted(tiny_models.bert().eval(), method), (), {"input_ids": torch.randint(1, 40, (4, 5))}


def adapted(model: nn.Module, method: Method) -> nn.Module:
    inject(model, method)
    for parameter in model.parameters():
        if parameter.requires_grad:  # no adapter starts where it would do nothing
            parameter.data.normal_(std=0.3)
    return model


CASES = pytest.mark.parametrize(
    ("build", "method"),
    [
        (layers, LoRA(r=2, target_modules=["up", "attention"], modules_to_save=["lstm", "head"])),
        (layers, PrefixTuning(num_virtual_tokens=3)),
        (bert, LoRA(r=2, modules_to_save="auto")),
        (bert, PrefixTuning(num_virtual_tokens=3, modules_to_save="auto")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else value.__name__,
)


def call(model: nn.Module, tensors: dict[str, Tensor], args: tuple, kwargs: dict) -> Tensor:
    output = functional_call(model, tensors, args, kwargs)
    return output if isinstance(output, Tensor) else output.logits


def other_values(model: nn.Module) -> dict[str, Tensor]:
    """Of the base and of the adapters."""
    return {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}


@CASES
def test_in_a_functional_call_the_given_tensors_act_and_nothing_of_the_model_changes(build, method):
    model, args, kwargs = build(method)
    given = other_values(model)
    twin = copy.deepcopy(model)
    twin.load_state_dict(given, strict=False)
    before = Snapshot(model)
    found = call(model, given, args, kwargs)
    # Not bit for bit: torch chooses kernels by whether a weight requires a gradient, and those given do not.
    torch.testing.assert_close(found, call(twin, {}, args, kwargs), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, call(model, {}, args, kwargs), atol=1e-3)
    before.assert_same(model)
    with disabled(model), disabled(twin):
        base = call(twin, {}, args, kwargs)
        torch.testing.assert_close(call(model, given, args, kwargs), base, rtol=1e-5, atol=1e-6)


@CASES
def test_grad_of_a_functional_call_is_that_of_backward(build, method):
    model, args, kwargs = build(method)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found = grad(lambda tensors: call(model, tensors, args, kwargs).square().sum())(trained)
    assert all(p.grad is None for p in model.parameters())
    call(model, {}, args, kwargs).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is (name in trained), name
        if name in trained:
            assert parameter.grad.any(), name
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_gradients_of_single_samples_come_from_vmap():
    model = adapted(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), LoRA(r=2, modules_to_save=["2"]))
    x = torch.randn(5, 6)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    each = vmap(grad(lambda tensors, row: functional_call(model, tensors, row).square().sum()), (None, 0))(trained, x)
    model(x).square().sum().backward()
    for name in trained:
        torch.testing.assert_close(each[name].sum(0), model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_an_interrupted_functional_call_leaves_the_base_as_it_was(monkeypatch):
    model, (x,), _ = layers(LoRA(r=2, target_modules=["attention"], modules_to_save=["head"]))
    before, output = Snapshot(model), model(x)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt  # torch's hooks that run always do not run after it

    with monkeypatch.context() as patch:
        patch.setattr(F, "multi_head_attention_forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            functional_call(model, other_values(model), (x,))
    assert_identical(model(x), output)
    before.assert_same(model)


@CASES
def test_a_plain_torch_loop_trains_the_adapter_and_leaves_the_base_alone(build, method):
    model, args, kwargs = build(method)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    target = torch.randn_like(call(model, {}, args, kwargs))
    losses = []
    for _ in range(20):
        loss = F.mse_loss(call(model, {}, args, kwargs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, tensor in base.items():
        assert_identical(model.get_parameter(name), tensor, name)
    remove(model)
    assert not any(".peft." in key for key in model.state_dict())
