"""A project as a user has it: plain torch and Lightning, nothing of PEFT in it; and the same on PEFTModule."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PEFTModule


def build_network() -> nn.Sequential:
    """The "pretrained" network: the same weights each time, whatever the seed is."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        return nn.Sequential(
            nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)
        )


class Steps(L.LightningModule):
    """The steps of a classifier ``self.net``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])


class Project(Steps):
    """An untouched LightningModule whose network is built in ``__init__``."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.build()

    def build(self) -> None:
        self.net = build_network()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class BuiltInConfigureModel(Project):
    def build(self) -> None:
        self.net: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = build_network()


class BuiltInSetup(Project):
    def build(self) -> None:
        self.net: nn.Sequential | None = None

    def setup(self, stage: str) -> None:
        if self.net is None:
            self.net = build_network()


class OnPEFTModule(PEFTModule, Steps):
    """The same project written on PEFTModule; its hooks forget to call ``super()``."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.net = build_network()

    def on_fit_start(self) -> None: ...

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...


class ProjectData(L.LightningDataModule):
    """64 rows of 16 numbers; the class is the place of the largest of the first 8."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        self.dataset = TensorDataset(x, x[:, :8].argmax(-1))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
