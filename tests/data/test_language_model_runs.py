"""Language model data under a real Trainer: a resumed run is the straight run, bit for bit."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny_models
import torch
from chat_tokenizers import CHATML, save

from lightning_peft.data import InstructionData, TextData


class Writer(L.LightningModule):
    """Trains a tiny Llama and notes its batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = tiny_models.llama(vocab_size=300, max_position_embeddings=64)
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"])
        return self.model(**batch, use_cache=False).loss

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch, use_cache=False).loss)

    def predict_step(self, batch: dict, batch_idx: int) -> list[str]:
        self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return batch["prompt"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class SaveAfterEachBatch(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def trainer(**options: Any) -> L.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(accelerator="cpu", max_epochs=2, **dict.fromkeys(quiet, False) | options)


@pytest.fixture
def make(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "x" * (i % 9 + 1)}) + "\n" for i in range(40)))
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(600))))
    tokenizer = save(tmp_path / "tokenizer", CHATML)

    def make(kind: str, **options: Any) -> L.LightningDataModule:
        common = {"tokenizer": tokenizer, "max_length": 64, "batch_size": 4, "validation_split": 4, **options}
        if kind == "text":
            return TextData(path=str(tmp_path / "text.txt"), **common)
        return InstructionData(path=str(rows), packing=kind == "packed", bucket=kind == "bucketed", **common)

    return make


@pytest.mark.parametrize(
    ("kind", "workers", "stops"),
    [
        ("packed", 0, (1, 3, 4)),
        ("packed", 1, (3,)),
        ("bucketed", 0, (3, 10)),
        ("random", 0, (3,)),
        ("text", 0, (5, 10)),
    ],
)
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_straight_run(kind, workers, stops, make, tmp_path):
    def run(*callbacks: L.Callback, **ckpt: Any) -> Writer:
        module = Writer()
        trainer(callbacks=[*callbacks]).fit(module, make(kind, num_workers=workers), weights_only=True, **ckpt)
        return module

    straight = run(SaveAfterEachBatch(tmp_path))
    half = len(straight.seen) // 2
    assert half > 2
    assert any(stop % half for stop in stops)
    for stop in stops:
        resumed = run(ckpt_path=tmp_path / f"{stop}.ckpt")
        assert len(resumed.seen) == len(straight.seen) - stop
        assert all(map(torch.equal, resumed.seen, straight.seen[stop:]))
        weights = straight.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in resumed.state_dict().items())
    assert not all(map(torch.equal, straight.seen[:half], straight.seen[half:]))  # each epoch has its own order


@pytest.mark.parametrize("kind", ["packed", "bucketed", "text"])
def test_all_stages_run(kind, make):
    module, data = Writer(), make(kind, test_split=4)
    fit = trainer()
    fit.fit(module, data)
    assert fit.callback_metrics["val_loss"] > 0
    fit.validate(module, data, verbose=False)
    if kind != "text":
        prompts = [prompt for batch in fit.predict(module, data) for prompt in batch]
        assert prompts == data.splits["test"]["prompt"][:]


def test_overfit_batches_sees_the_same_rows_each_epoch(make):
    module = Writer()
    trainer(overfit_batches=1).fit(module, make("packed"))
    assert torch.equal(*module.seen)
