"""Every method on one small task: `python examples/compare_methods.py` (about half an hour on two CPU cores).

all-MiniLM-L6-v2, 2,000 film-review sentences, two epochs, one seed; accuracy on 1,000 other sentences, whose standard
error is 0.01. Each method runs as the first line of its file in configs/methods says. Names of files choose:
`python examples/compare_methods.py lora ia3`; earlier results stay in the table. With --write it goes into the README.
"""

import contextlib
import io
import json
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
    --data.init_args.max_length 64 --data.init_args.batch_size 16
    --trainer.max_epochs 2 --trainer.limit_val_batches 0 --trainer.callbacks null --trainer.logger false
    --trainer.enable_checkpointing false --trainer.enable_progress_bar false --peft.show false
"""
RESULTS = ROOT / "checkpoints/compare"
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs/methods").glob("*.yaml"))}
COMMANDS = {name: path.read_text().splitlines()[0].lstrip("# ") for name, path in CONFIGS.items()}
COMMANDS["full"] = "lightning-peft fit --config configs/quickstart.yaml --peft.method null --model.init_args.lr 1e-4"


def run(command: list[str]) -> dict[str, float]:
    """Run one command on the small task, and test what it has trained."""
    task = shlex.split(TASK.format(model=model_dir(), sentences=movie_sentences()))
    sys.argv = sys.argv[:1]
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        cli = PEFTCLI([*command[1:], *task], save_config_callback=None)
        seconds = time.monotonic() - began
        accuracy = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]["test_accuracy"]
    trained = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    return {"trained": trained, "lr": cli.model.lr, "accuracy": accuracy, "seconds": round(seconds)}


def main(names: list[str], write: bool) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, command in COMMANDS.items():
        if name in names or not names:
            result = run(shlex.split(command))
            (RESULTS / f"{name}.json").write_text(json.dumps(result))
            print(f"{name:20} {result['accuracy']:.3f}", flush=True)
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    ranked = sorted(results.items(), key=lambda item: -item[1]["accuracy"])
    table = Table("method", "trained", "learning rate", "accuracy", "seconds", title="2,000 sentences, 2 epochs")
    lines = ["| method | trained | learning rate | accuracy |", "|---|---:|---:|---:|"]
    for name, row in ranked:
        shown = f"{row['trained']:,}", f"{row['lr']:g}", f"{row['accuracy']:.3f}"
        table.add_row(name, *shown, str(row["seconds"]))
        linked = f"[{name}](configs/methods/{name}.yaml)" if name in CONFIGS else "full fine-tuning"
        lines.append(f"| {linked} | {' | '.join(shown)} |")
    rich.print(table)
    if write:
        readme = ROOT / "README.md"
        before, _, rest = readme.read_text().partition("<!-- comparison -->\n")
        after = rest.partition("<!-- /comparison -->")[2]
        readme.write_text("\n".join([f"{before}<!-- comparison -->", *lines, f"<!-- /comparison -->{after}"]))


if __name__ == "__main__":
    torch.manual_seed(0)
    arguments = sys.argv[1:]
    main([name for name in arguments if not name.startswith("--")], "--write" in arguments)
