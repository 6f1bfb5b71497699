"""In a Trainer's run, too, what is frozen has no gradient, no optimizer state, and below the adapters no backward."""

from itertools import pairwise

import lightning as L
import pytest
import tiny_models
import torch
from benchmarks.measuring import bytes_kept
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTCallback, PEFTModule

LAYERS = 4


class Task(L.LightningModule):
    """A classifier of texts as a user has it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_models.bert(num_hidden_layers=LAYERS)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Own(PEFTModule):
    """The same with the optimizer that the library makes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_models.bert(num_hidden_layers=LAYERS)

    training_step = Task.training_step


class Watch(L.Callback):
    """Looks, at every step, at what has a gradient and a backward."""

    def __init__(self) -> None:
        self.graded: set[str] = set()
        self.backward: set[int] = set()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for i, block in enumerate(module.net.bert.encoder.layer):
            block.register_forward_hook(lambda *call, i=i: self._watch(i, call[2]))

    def _watch(self, i: int, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self.backward.add(i))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: object) -> None:
        self.graded |= {name for name, p in module.named_parameters() if p.grad is not None}


@pytest.fixture
def data() -> DataLoader:
    ids = torch.arange(24).view(4, 6) + 3
    rows = [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(ids)]
    return DataLoader(rows, batch_size=2)


def _trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("build", [Task, Own])
def test_only_what_trains_has_a_gradient_a_backward_and_an_optimizer_state(
    build: type[L.LightningModule], precision: str, data, trainer
) -> None:
    module, watch = build(), Watch()
    base = {name: p.untyped_storage().nbytes() for name, p in module.named_parameters()}
    run = trainer(PEFTCallback(LoRA(r=2, layers=[-2, -1]), show=False), watch, precision=precision)
    run.fit(module, data)
    names = {id(p): name for name, p in module.named_parameters()}
    assert watch.graded == _trained(module)
    assert all(".peft." in name for name in watch.graded)
    assert watch.backward == {2, 3}, "of four blocks"
    (optimizer,) = run.optimizers
    assert {names[id(p)] for p in optimizer.state} == _trained(module)
    if build is Own:
        assert {names[id(p)] for group in optimizer.param_groups for p in group["params"]} == _trained(module)
    width = 2 if precision == "bf16-true" else 1
    for name, parameter in module.named_parameters():
        if name in base:
            assert parameter.untyped_storage().nbytes() * width == base[name], name


def test_the_fewer_layers_are_reached_the_less_a_step_keeps(data, trainer) -> None:
    batch, kept = next(iter(data)), []
    for layers in ([3], [2, 3], [1, 2, 3], [0, 1, 2, 3]):
        module = Task()
        trainer(PEFTCallback(LoRA(r=2, layers=layers), show=False)).fit(module, data)
        kept.append(bytes_kept(module, lambda: module.training_step(batch, 0)))  # noqa: B023
    steps = {b - a for a, b in pairwise(kept)}
    assert len(steps) == 1, kept
    assert steps.pop() > 0
