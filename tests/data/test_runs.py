"""The data module under a real Trainer, and the configs of the repository."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from batches import first_tokens
from lightning.pytorch.cli import LightningArgumentParser

from lightning_peft.data import InstructionData, LengthBucketBatchSampler, TextClassificationData, TextData
from lightning_peft.errors import DataError


class Recorder(L.LightningModule):
    """Notes which rows it sees in which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 2)
        self.seen: dict[int, list[list[int]]] = {}

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).append(first_tokens(batch))
        return self._loss(batch)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def predict_step(self, batch: dict, batch_idx: int) -> list[str]:
        return batch["text"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def _loss(self, batch: dict) -> torch.Tensor:
        scores = self.linear(batch["attention_mask"].sum(1, keepdim=True).float())
        return torch.nn.functional.cross_entropy(scores, batch["labels"])


def trainer(epochs: int, **options) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", max_epochs=epochs, **quiet | options)


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_sees_the_batches_of_a_straight_run(workers: int, bucket: bool, make, tmp_path):
    def run(epochs: int, ckpt_path: str | None = None) -> tuple[Recorder, L.Trainer]:
        module, fit = Recorder(), trainer(epochs)
        torch.manual_seed(os.getpid() + epochs)  # the order must not depend on it
        fit.fit(module, make(num_workers=workers, bucket=bucket), ckpt_path=ckpt_path, weights_only=True)
        return module, fit

    straight, fit = run(4)
    assert isinstance(fit.train_dataloader.batch_sampler, LengthBucketBatchSampler) is bucket
    assert [sorted(row for batch in straight.seen[epoch] for row in batch) for epoch in range(4)] == [
        sorted(row for batch in straight.seen[0] for row in batch)
    ] * 4
    assert len({str(straight.seen[epoch]) for epoch in range(4)}) == 4
    half, fit = run(2)
    fit.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(4, tmp_path / "half.ckpt")
    assert half.seen | resumed.seen == straight.seen
    assert list(resumed.seen) == [2, 3]


class SaveAfterEachBatch(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        self.batches += 1
        trainer.save_checkpoint(self.folder / f"{self.batches}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, *args: object) -> None:
        """Where a ModelCheckpoint saves that monitors a validation."""
        trainer.save_checkpoint(self.folder / f"{self.batches}-validated.ckpt")


@pytest.mark.parametrize(
    ("options", "workers", "stops"),
    [
        ({}, 0, range(1, 12)),
        ({}, 1, (1, 4, 6)),
        ({"limit_train_batches": 3}, 0, range(1, 9)),
        ({"val_check_interval": 2}, 0, range(1, 12)),
        ({"accumulate_grad_batches": 2}, 0, range(2, 12, 2)),
    ],
    ids=str,
)
def test_a_run_resumed_anywhere_sees_the_batches_of_a_straight_run(options, workers, stops, make, tmp_path):
    """With a plain DataLoader Lightning would begin the epoch again, and leave out its end."""

    def run(*callbacks: L.Callback, **ckpt: Path) -> list[list[int]]:
        module = Recorder()
        fit = trainer(3, callbacks=[*callbacks], **options)
        fit.fit(module, make(batch_size=24, num_workers=workers), weights_only=True, **ckpt)
        return [batch for epoch in module.seen.values() for batch in epoch]

    straight = run(SaveAfterEachBatch(tmp_path))
    for stop in stops:
        for path in tmp_path.glob(f"{stop}[.-]*"):
            assert run(ckpt_path=path) == straight[stop:], path.name


def test_all_stages_run(make, rows):
    data, module = make(test_split=10), Recorder()
    fit = trainer(1)
    fit.fit(module, data)
    assert "val_loss" in fit.callback_metrics
    fit.validate(module, data, verbose=False)
    texts = [text for batch in fit.predict(module, data) for text in batch]
    assert texts == data.splits["test"]["text"][:]


def test_a_run_without_validation_rows(make):
    module = Recorder()
    trainer(1).fit(module, make(validation_split=0))
    assert sum(map(len, module.seen[0])) == 90


def test_overfit_batches_sees_the_same_rows_each_epoch(make):
    module = Recorder()
    trainer(2, overfit_batches=2).fit(module, make())
    assert module.seen[0] == module.seen[1]
    assert len(module.seen[0]) == 2


def test_bad_data_stops_the_run_before_training(make):
    module = Recorder()
    with pytest.raises(DataError, match="txet"):
        trainer(1).fit(module, make(text_column="txet"))
    assert module.seen == {}


# --- the configs -----------------------------------------------------------------------------------------------------

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


def build(config: Path) -> L.LightningDataModule:
    """Build the data module as the command does."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    return parser.instantiate(parser.parse_args([f"--data={config}"])).data


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_the_configs_parse_and_open_with_their_command(config: Path):
    first = config.read_text().splitlines()[0]
    assert first.startswith("# lightning-peft fit --")
    assert first.endswith(f" --data configs/data/{config.name}")
    kinds = {"instructions.yaml": InstructionData, "text.yaml": TextData}
    assert type(build(config)) is kinds.get(config.name, TextClassificationData)


@pytest.mark.slow  # the real sentences, all of them
def test_the_demo_config_gives_the_demo_data(monkeypatch):
    """The numbers in the documentation stand on these splits."""
    monkeypatch.chdir(Path(__file__).parents[2])
    subprocess.run([sys.executable, "examples/assets.py", "--cache", ".cache"], check=True)
    data = build(Path("configs/data/movie_sentences.yaml"))
    data.setup("fit")
    assert [len(data.splits[split]) for split in ("train", "validation", "test")] == [7171, 1000, 1000]
    assert data.label_names == ["negative", "positive"]
    batch = next(iter(data.train_dataloader()))
    assert (batch["input_ids"][:, 0] == 101).all()  # BERT's [CLS]
    cells = sum(batch["input_ids"].numel() for batch in data.train_dataloader())
    words = sum(int(batch["attention_mask"].sum()) for batch in data.train_dataloader())
    assert words > 0.95 * cells  # without bucketing 0.52
