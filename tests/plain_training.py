"""The oracle of methods that train parameters of the base: plain torch, on a copy, with the parameters themselves."""

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import disabled, inject, remove
from lightning_peft.core.method import Method

Run = Callable[[nn.Module], Tensor]
IDS = torch.tensor([[5, 9, 7, 3], [8, 4, 6, 1]])


def logits(model: nn.Module) -> Tensor:
    """Run a model of transformers on two texts."""
    scores: Tensor = model(IDS).logits
    return scores


def translated(model: nn.Module) -> Tensor:
    """Run an encoder-decoder model on two texts and the beginnings of two others."""
    scores: Tensor = model(IDS, decoder_input_ids=IDS[:, :3]).logits
    return scores


def trained(model: nn.Module, run: Run, steps: int = 3, weight_decay: float = 0.1) -> list[float]:
    """Train what requires a gradient; returns the losses."""
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=0.02, weight_decay=weight_decay)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(run(model))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def loss_of(output: Tensor) -> Tensor:
    """A number that depends on every part of the output."""
    return (output * torch.linspace(0.5, 1.5, output.numel()).view_as(output)).square().mean()


def plain(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A copy of which exactly the parameters ``names`` train."""
    duplicate = copy.deepcopy(model).eval()
    known = dict(duplicate.named_parameters(remove_duplicate=False))
    assert known.keys() >= set(names), set(names) - known.keys()
    duplicate.requires_grad_(False)
    for name in names:
        known[name].requires_grad_()
    return duplicate


def assert_trains_as_plain_torch(model: nn.Module, method: Method, names: Collection[str], run: Run) -> Any:
    """Train ``method`` on ``model``, and the parameters ``names`` of a copy: all that can be seen must be the same.

    Returns:
        The adapted, trained model.
    """
    randomise(model)
    expected = plain(model, names)
    report = inject(model.eval(), method)
    wanted = {id(p): p for p in expected.parameters() if p.requires_grad}
    assert report.trainable == sum(p.numel() for p in wanted.values())
    losses = trained(expected, run)
    assert losses[-1] != losses[0]
    torch.testing.assert_close(torch.tensor(trained(model, run)), torch.tensor(losses), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(run(model), run(expected), rtol=1e-3, atol=1e-5)
    return model


def assert_leaves_no_trace(model: nn.Module, method: Method, run: Run) -> None:
    """Train ``method`` on ``model``: disabled the base computes as before, removed it is what it was, bit for bit."""
    before, expected = Snapshot(model.eval()), run(model).detach()
    inject(model, method)
    trained(model, run)
    assert (run(model) - expected).abs().max() > 1e-3
    with disabled(model):
        torch.testing.assert_close(run(model), expected)
    remove(model)
    before.assert_same(model)


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy of which the parameters in ``masks`` train, where these are true. Train it without weight decay."""
    duplicate = plain(model, masks)
    for name, mask in masks.items():
        duplicate.get_parameter(name).register_hook(lambda gradient, mask=mask: gradient * mask)
    return duplicate


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move every vector away from 0 and 1, where many start, so that a wrong one can be seen."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
