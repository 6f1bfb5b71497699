"""What must not grow while a module trains on and on: hooks, tensors, memory and files."""

import gc
import os
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from project import Project
from snapshot import hook_counts
from torch import Tensor, nn

from lightning_peft import LoRA, PEFTCallback, PrefixTuning

STEPS, EVERY = 2000, 50


class Attending(Project):
    """A network with every kind of adapter: beside an output, before an input, in place of a weight."""

    def build(self) -> None:
        super().build()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)[:, None]
        return (y + self.attention(y, y, y, need_weights=False)[0])[:, 0]


METHODS = [LoRA(r=2, modules_to_save=["net.5"]), PrefixTuning(num_virtual_tokens=2, modules_to_save=["net.5"])]


def hooks(module: nn.Module, *optimizers: torch.optim.Optimizer) -> Counter[str]:
    """How many hooks there are of each kind, on modules, parameters and optimizers."""
    counts: Counter[str] = Counter()
    for below in (*module.modules(), *optimizers):
        counts.update(hook_counts(below))
    for parameter in module.parameters():
        counts["parameters"] += len(parameter._backward_hooks or ()) + len(parameter._post_accumulate_grad_hooks or ())
    return counts


class Watch(L.Callback):
    """Notes, with every checkpoint, what there is."""

    def __init__(self) -> None:
        self.hooks: list[Counter[str]] = []
        self.tensors: list[int] = []
        self.memory: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        if trainer.global_step % EVERY == 0:
            gc.collect()
            self.hooks.append(hooks(pl_module, *trainer.optimizers))
            self.tensors.append(sum(issubclass(type(found), Tensor) for found in gc.get_objects()))
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))


@pytest.mark.soak
@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=[pytest.mark.slow] if method is METHODS[0] else []) for method in METHODS],
    ids=lambda method: type(method).__name__,
)
def test_in_two_thousand_steps_nothing_grows(method, data, trainer, tmp_path):
    watch = Watch()
    keeps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=EVERY, save_top_k=-1)
    model = Attending()
    ends = {"max_epochs": -1, "max_steps": STEPS, "check_val_every_n_epoch": 100}
    trainer(PEFTCallback(method, show=False), keeps, watch, **ends).fit(model, data, data)

    sizes = [(tmp_path / f"step={step}.ckpt").stat().st_size for step in range(EVERY, STEPS + 1, EVERY)]
    assert len(sizes) == len(watch.hooks) == STEPS // EVERY
    assert max(sizes) - min(sizes) < 512  # numbers of more digits
    assert len(set(map(str, watch.hooks))) == 1
    assert watch.hooks[0]["_forward_hooks"]
    warm = len(watch.tensors) // 4  # behind the first validation, whose result stays
    assert len(set(watch.tensors[warm:])) == 1
    assert watch.memory[-1] - watch.memory[warm] < 2 * 2**20


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_stages_that_follow_one_another_leave_nothing_behind(method, data, trainer):
    model, seen = Attending(), []
    for _ in range(3):
        run = trainer(PEFTCallback(method, show=False))
        run.fit(model, data, data)
        run.test(model, data, verbose=False)
        run.predict(model, data)
        seen.append((hooks(model, *run.optimizers), sorted(vars(model)), sum(1 for _ in model.modules())))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0]["parameters"] == 0
