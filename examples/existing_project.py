"""PEFT in a project that knows nothing of it: `python examples/existing_project.py` (20 seconds on a laptop).

The network, its LightningModule and its data are plain torch. A network pretrained on one task is adapted to another
with one more callback; checkpoint, resume, load and merge follow.
"""

import math
import tempfile
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PEFTCallback, load_from_checkpoint, merge


# The project as it was ------------------------------------------------------------------------------------------------
class BarClassifier(L.LightningModule):
    """Tells the direction of a noisy bar in a 16 x 16 image."""

    def __init__(self, base: str | None = None, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 8))
        if base:  # start from the pretrained network
            self.load_state_dict(torch.load(base, weights_only=True)["state_dict"])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def bars(rows: int, turn: float, seed: int) -> DataLoader:
    """Bars in 8 directions, all turned by the same angle: another angle is another task."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 8, (rows,), generator=random)
    angle = (labels * math.pi / 8 + turn).view(-1, 1, 1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    images = torch.exp(-30 * (x * torch.sin(angle) - y * torch.cos(angle)) ** 2)
    images = images + 0.4 * torch.randn(images.shape, generator=random)
    return DataLoader(TensorDataset(images.unsqueeze(1), labels), batch_size=64)


def trainer(epochs: int, *callbacks: L.Callback) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **quiet)


def accuracy(model: L.LightningModule, data: DataLoader) -> float:
    return trainer(1).validate(model, data, verbose=False)[0]["accuracy"]


# PEFT -----------------------------------------------------------------------------------------------------------------
def main(folder: Path) -> None:
    L.seed_everything(0)
    base, task = folder / "base.ckpt", folder / "task.ckpt"
    pretraining = trainer(3)
    pretraining.fit(BarClassifier(), bars(3000, turn=0.0, seed=0))
    pretraining.save_checkpoint(base, weights_only=True)

    train, test = bars(1500, turn=math.pi / 16, seed=1), bars(1000, turn=math.pi / 16, seed=2)
    model = BarClassifier(base=str(base))
    print(f"pretrained network on the new task: accuracy {accuracy(model, test):.3f}")

    # The one line: PEFTCallback. Convolutions are asked for by name; "all-linear" is the default.
    peft = PEFTCallback(LoRA(r=4, target_modules=["encoder.0", "encoder.4", "head.1", "head.3"]))
    tuning = trainer(3, peft)
    tuning.fit(model, train)
    tuning.save_checkpoint(task)
    print(f"with LoRA:                          accuracy {accuracy(model, test):.3f}")
    print(f"base.ckpt {base.stat().st_size:,} bytes, task.ckpt {task.stat().st_size:,} bytes (with optimizer state)")

    # Resume from the adapter-only checkpoint, as from any other.
    resumed = BarClassifier(base=str(base))
    trainer(5, PEFTCallback(peft.method, show=False)).fit(resumed, train, ckpt_path=task)
    print(f"resumed for two more epochs:        accuracy {accuracy(resumed, test):.3f}")

    # Load it into the untouched class; then fold it into the weights: a plain BarClassifier again.
    loaded = load_from_checkpoint(BarClassifier, task)
    print(f"loaded from task.ckpt:              accuracy {accuracy(loaded, test):.3f}")
    merge(loaded)
    assert type(loaded) is BarClassifier
    assert loaded.state_dict().keys() == BarClassifier().state_dict().keys()
    print(f"merged, a plain {type(loaded).__name__}:      accuracy {accuracy(loaded, test):.3f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
