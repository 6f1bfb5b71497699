"""A run that can be killed and resumed: what a process of its own does."""

from pathlib import Path
from typing import Any

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


def train(folder: Path, save_top_k: int, result: Path, ckpt_path: str | Path | None = None) -> None:
    """Train with a checkpoint at every step, and write the final state to ``result``."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    model = Scheduled()
    every_step = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=save_top_k, save_last=True)
    trainer = L.Trainer(
        callbacks=[PEFTCallback(LoRA(r=4, modules_to_save=["net.5"]), show=False), every_step],
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, shuffled_data(), ckpt_path=ckpt_path, weights_only=True)
    optimizer = trainer.optimizers[0].state_dict()
    torch.save({"model": model.state_dict(), "optimizer": optimizer, "step": trainer.global_step}, result)
