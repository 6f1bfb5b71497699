"""Every method on one small task: `python examples/compare_methods.py` (about 25 minutes on two CPU cores).

all-MiniLM-L6-v2, 2,000 film-review sentences, two epochs, one seed; accuracy on 1,000 other sentences, whose standard
error is 0.01. Each method runs as the first line of its file in configs/methods says. Names of files choose:
`python examples/compare_methods.py lora ia3`. With --write the table goes into the README.
"""

import contextlib
import io
import re
import shlex
import sys
import time
from pathlib import Path

import rich
import torch
from assets import model_dir, movie_sentences
from rich.table import Table

from lightning_peft.cli import PEFTCLI

ROOT = Path(__file__).parents[1]
TASK = """
    --model.init_args.model {model} --data.init_args.tokenizer {model} --data.init_args.path {sentences}
    --data.init_args.validation_split 6171 --data.init_args.test_split 1000
    --data.init_args.max_length 48 --data.init_args.batch_size 16
    --trainer.max_epochs 2 --trainer.limit_val_batches 0 --trainer.callbacks null --trainer.logger false
    --trainer.enable_checkpointing false --trainer.enable_progress_bar false --peft.show false
"""
Row = tuple[str, int, float, float, int]  # file, parameters that train, learning rate, accuracy, seconds


def run(config: Path) -> Row:
    """Train and test the method of one file as its first line says, on the small task."""
    command = shlex.split(config.read_text().splitlines()[0].lstrip("# "))[1:]
    task = shlex.split(TASK.format(model=model_dir(), sentences=movie_sentences()))
    sys.argv = sys.argv[:1]
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        cli = PEFTCLI([*command, *task])
        seconds = time.monotonic() - began
        accuracy = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]["test_accuracy"]
    trained = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    return config.stem, trained, cli.model.lr, accuracy, round(seconds)


def markdown(rows: list[Row]) -> str:
    lines = ["| method | trained | learning rate | accuracy |", "|---|---:|---:|---:|"]
    for name, trained, lr, accuracy, _ in sorted(rows, key=lambda row: -row[3]):
        lines.append(f"| [{name}](configs/methods/{name}.yaml) | {trained:,} | {lr:g} | {accuracy:.3f} |")
    return "\n".join(lines)


def main(names: list[str], write: bool) -> None:
    files = sorted((ROOT / "configs/methods").glob("*.yaml"))
    rows: list[Row] = []
    for file in files:
        if not names or file.stem in names:
            rows.append(run(file))
            print(f"{file.stem:20} {rows[-1][3]:.3f}", flush=True)
    table = Table("method", "trained", "learning rate", "accuracy", "seconds", title="2,000 sentences, 2 epochs")
    for row in sorted(rows, key=lambda row: -row[3]):
        table.add_row(row[0], f"{row[1]:,}", f"{row[2]:g}", f"{row[3]:.3f}", str(row[4]))
    rich.print(table)
    if write:
        readme = ROOT / "README.md"
        parts = re.split(r"(?<=<!-- comparison -->\n)|(?=<!-- /comparison -->)", readme.read_text())
        readme.write_text(f"{parts[0]}{markdown(rows)}\n{parts[2]}")


if __name__ == "__main__":
    torch.manual_seed(0)
    arguments = sys.argv[1:]
    main([name for name in arguments if not name.startswith("--")], "--write" in arguments)
