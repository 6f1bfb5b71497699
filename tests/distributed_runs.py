"""Runs on one or several processes: a script, since Lightning's ``ddp`` starts it again for each process.

    python distributed_runs.py STRATEGY FOLDER CASE...

A case is a name of ``CASES``, or that name and a checkpoint to resume from (``bert-lora=PATH``).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import tiny_models
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from project import Project
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_peft import LoRA, PEFTCallback, PEFTModule, PrefixTuning, PTuning, inject
from lightning_peft.checkpoints.ckpt import adapter_state
from lightning_peft.core.method import Method

EPOCHS, BATCH, BATCHES = 2, 16, 4


class BertProject(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1234)
            self.net = tiny_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(input_ids=batch[0]).logits, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class OwnBert(PEFTModule, BertProject):
    """The same written on PEFTModule."""

    configure_optimizers = BertProject.configure_optimizers


def numbers() -> TensorDataset:
    x = torch.randn(BATCH * BATCHES, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :8].argmax(-1))


def texts() -> TensorDataset:
    random = torch.Generator().manual_seed(0)
    x = torch.randint(1, tiny_models.VOCABULARY, (BATCH * BATCHES, 6), generator=random)
    return TensorDataset(x, x[:, 0] % 2)


class Dealt(L.LightningDataModule):
    """Rows dealt out to the processes in turn: together these see the batches that one process sees."""

    def __init__(self, rows: TensorDataset) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> DataLoader:
        count, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.rows, num_replicas=count, rank=rank, shuffle=False)
        return DataLoader(self.rows, batch_size=BATCH // count, sampler=sampler)


@dataclass
class Case:
    module: Callable[[], L.LightningModule]
    method: Method
    rows: Callable[[], TensorDataset]


def injected() -> Project:
    module = Project()
    inject(module, LoRA(r=4))
    return module


CASES = {
    "project": Case(Project, LoRA(r=4), numbers),
    "injected": Case(injected, LoRA(r=4), numbers),
    "bert-lora": Case(BertProject, LoRA(r=4, modules_to_save="auto"), texts),
    "bert-prefix": Case(BertProject, PrefixTuning(num_virtual_tokens=3), texts),
    "own-bert-p-tuning": Case(OwnBert, PTuning(num_virtual_tokens=3, modules_to_save="auto"), texts),
}


_ANY_DEVICE = {"accelerator": "auto", "devices": 1}
STRATEGIES: dict[str, Callable[[], dict[str, Any]]] = {
    "one process": lambda: {"devices": 1},
    "ddp": lambda: {"strategy": "ddp"},
    "ddp_spawn": lambda: {"strategy": "ddp_spawn"},
    "sync_batchnorm": lambda: {"strategy": "ddp", "sync_batchnorm": True},
    "fsdp2": lambda: {"strategy": ModelParallelStrategy()},
    "fsdp": lambda: {"strategy": FSDPStrategy(), **_ANY_DEVICE},
    "deepspeed": lambda: {"strategy": DeepSpeedStrategy(), **_ANY_DEVICE},
}


def run(name: str, strategy: str, folder: Path, ckpt_path: Path | None = None) -> None:
    """Train a case for two epochs.

    Written to ``folder``: ``{name}-epoch=0.ckpt`` and ``-epoch=1.ckpt``, and ``{name}.pt`` with the adapter that the
    module has in the calling process afterwards.
    """
    case = CASES[name]
    L.seed_everything(7, verbose=False)
    module = case.module()
    each_epoch = ModelCheckpoint(folder, name + "-{epoch}", every_n_epochs=1, save_top_k=-1)
    options = {"accelerator": "cpu", "devices": 2, **STRATEGIES[strategy]()}
    trainer = L.Trainer(
        callbacks=[PEFTCallback(case.method, show=False), each_epoch],
        max_epochs=EPOCHS,
        use_distributed_sampler=False,  # Lightning's own would shuffle
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, Dealt(case.rows()), ckpt_path=ckpt_path, weights_only=True)
    if trainer.is_global_zero:
        torch.save(adapter_state(module), folder / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[3:]:
        name, *path = argument.split("=", maxsplit=1)
        run(name, sys.argv[1], Path(sys.argv[2]), *map(Path, path))
