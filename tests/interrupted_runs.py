"""A run that can be killed and resumed: what a process of its own does."""

import os
import resource
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from project import Project
from torch.utils.data import TensorDataset

from lightning_peft import LoRA, PEFTCallback
from lightning_peft.data import EpochRandomSampler, ResumableDataLoader

EPOCHS, BATCHES = 3, 10


class Scheduled(Project):
    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = super().configure_optimizers()
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def shuffled_data() -> ResumableDataLoader:
    x = torch.randn(8 * BATCHES, 16, generator=torch.Generator().manual_seed(0))
    rows = TensorDataset(x, x[:, :8].argmax(-1))
    return ResumableDataLoader(rows, batch_size=8, sampler=EpochRandomSampler(rows))


class Kill(NamedTuple):
    """When a process ends itself, with no chance to clean up."""

    step: int
    moment: str
    """"time", "write" (in the middle of a file), or the name of an audit event on a file in the folder."""
    after: float
    """With "time", seconds since the step began; with "write", the share of the file that is written."""


class Killed(L.Callback):
    """Carries a :class:`Kill` out."""

    def __init__(self, kill: Kill, folder: Path) -> None:
        self.kill, self.folder = kill, folder
        self.timer: threading.Timer | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.kill.step and self.kill.moment == "time":
            self.timer = threading.Timer(self.kill.after, end)
            self.timer.start()
        elif trainer.global_step == self.kill.step:
            sys.addaudithook(self.watch)

    def watch(self, event: str, args: tuple[Any, ...]) -> None:
        if event == self.kill.moment and str(args[0]).startswith(str(self.folder)):
            end()
        if event == "tempfile.mkstemp" and self.kill.moment == "write":
            size = min(path.stat().st_size for path in self.folder.glob("*.ckpt"))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends a process that writes beyond the limit
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * self.kill.after),) * 2)

    def on_fit_end(self, *_: Any) -> None:
        if self.timer is not None:
            self.timer.join()


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(
    folder: Path, save_top_k: int, result: Path, kill: Kill | None = None, ckpt_path: str | Path | None = None
) -> None:
    """Train with a checkpoint at every step, and write the final state to ``result``."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    tempfile.tempdir = str(folder.parent)  # where Lightning writes first; a killed run leaves it there
    model = Scheduled()
    every_step = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=save_top_k, save_last=True)
    trainer = L.Trainer(
        callbacks=[
            PEFTCallback(LoRA(r=4, modules_to_save=["net.5"]), show=False),
            every_step,
            *([Killed(kill, folder)] if kill else []),
        ],
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, shuffled_data(), ckpt_path=ckpt_path, weights_only=True)
    optimizer = trainer.optimizers[0].state_dict()
    torch.save({"model": model.state_dict(), "optimizer": optimizer, "step": trainer.global_step}, result)
