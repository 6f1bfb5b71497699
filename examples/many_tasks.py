"""Many tasks on one model: `python examples/many_tasks.py [STEPS [FOLDER]]` (five minutes on two CPU cores).

Three small adapters, one each for sentences about films, for product reviews and for tweets, are trained on one
all-MiniLM-L6-v2 and written to disk. Then one loaded model serves all three: switched by name, mixed row by row in a
single batch, and combined into a fourth. FOLDER, if it is given, keeps the three for `examples/serve.py`.
"""

import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import rich
import torch
from assets import model_dir, sentences
from rich.table import Table

from lightning_peft import LoRA, PEFTCallback, activate, adapters, combine, load_adapter, route, save_adapter
from lightning_peft.data import TextClassificationData
from lightning_peft.training.tasks.classification import TextClassifier

TASKS = ("movie", "amazon", "tweets")
ROWS = 400  # of each task to test on


def data_of(task: str) -> TextClassificationData:
    return TextClassificationData(
        str(model_dir()), str(sentences(task)), validation_split=100, test_split=ROWS, batch_size=16, max_length=48
    )


def train(task: str, steps: int, folder: Path) -> None:
    """Train the adapter of one task on its own copy of the base, and write it to ``folder/task``."""
    L.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    peft = PEFTCallback(LoRA(r=8), show=False)
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, **quiet, callbacks=[peft])
    model = TextClassifier(str(model_dir()), dropout=0.0)
    trainer.fit(model, data_of(task))
    save_adapter(model, folder / task)


@torch.no_grad()
def accuracy(model: TextClassifier, task: str) -> float:
    """The share of the task's test sentences that ``model`` tells right, as it is."""
    data = data_of(task)
    data.setup("test")
    right = [model(**inputs).argmax(-1) == labels for inputs, labels in map(split, data.test_dataloader())]
    return torch.cat(right).float().mean().item()


def split(batch: dict) -> tuple[dict, torch.Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}, batch["labels"]


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main(folder: Path, steps: int) -> None:
    for task in TASKS:
        train(task, steps, folder)

    # One model for all three, each adapter loaded from its directory.
    model = TextClassifier(str(model_dir())).eval()
    for task in TASKS:
        load_adapter(model, folder / task, task)
    for adapter in adapters(model):
        print(f"{adapter.name}: {type(adapter.method).__name__}, {adapter.parameters:,} parameters")
    # A fourth one out of them: no training.
    combine(model, {"movie": 0.5, "amazon": 0.5, "tweets": 0.5}, method="cat", name="all")

    table = Table(title="Test accuracy")
    for column in ("adapter", *TASKS):
        table.add_column(column, justify="left" if column == "adapter" else "right")
    for name in (*TASKS, "all"):
        activate(model, name)
        table.add_row(name, *(f"{accuracy(model, task):.3f}" for task in TASKS))
    rich.print(table)

    began = time.perf_counter()
    for i in range(300):
        activate(model, TASKS[i % 3])
    print(f"switching takes {(time.perf_counter() - began) / 300 * 1e3:.2f} ms and touches no weight")

    # One batch, many tasks: each row gets the adapter that it needs, None the base.
    mixed = {task: next(iter(loader_of(task))) for task in TASKS}
    rows = [split(mixed[task])[0]["input_ids"][:2] for task in TASKS]
    width = max(ids.shape[1] for ids in rows)
    ids = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad(), route(model, [task for task in TASKS for _ in range(2)]):
        together = model(**inputs)
    with torch.no_grad():
        for i, task in enumerate(TASKS):
            activate(model, task)
            alone = model(**{key: value[2 * i : 2 * i + 2] for key, value in inputs.items()})
            apart = (alone - together[2 * i : 2 * i + 2]).abs().max()
            print(f"{task}: its two rows of the mixed batch differ by {apart:.0e} from the adapter alone")

    base, small = size(model_dir()), [size(folder / task) for task in TASKS]
    print(f"three adapters: {sum(small):,} bytes; three whole models: {3 * base:,} bytes")


def loader_of(task: str) -> torch.utils.data.DataLoader:
    data = data_of(task)
    data.setup("test")
    return data.test_dataloader()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
        main(Path(sys.argv[2] if len(sys.argv) > 2 else name), steps)
