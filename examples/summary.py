"""What the demo has made, in a few lines: read from its files alone. `make demo` ends with it."""

import csv
from math import prod
from pathlib import Path

import torch

CHECKPOINT = Path("checkpoints/quickstart/best.ckpt")
MODEL = Path(".cache/minilm/model.safetensors")


def last_test_accuracy(logs: Path = Path("lightning_logs/quickstart")) -> float:
    """The accuracy that the last `lightning-peft test` logged."""
    newest = sorted(logs.glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest:
        with path.open() as file:
            for row in csv.DictReader(file):
                if row.get("test_accuracy"):
                    return float(row["test_accuracy"])
    raise SystemExit("No test has been run yet: run `make demo`.")


def main() -> None:
    checkpoint = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
    trained = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    base = sum(prod(shape) for shape in checkpoint["lightning_peft"]["base"]["shapes"])
    weights = sum(tensor.nbytes for tensor in checkpoint["state_dict"].values())
    command = ".venv/bin/lightning-peft"
    print(f"""
LoRA on all-MiniLM-L6-v2, film-review sentences
  test accuracy   {last_test_accuracy():.3f} on 1,000 sentences
  trained         {trained:,} parameters, {trained / (trained + base):.2%} of the model's
  adapter file    {CHECKPOINT.stat().st_size / 1e6:.1f} MB with optimizer state, {weights / 1e6:.1f} MB without
  full model      {MODEL.stat().st_size / 1e6:.1f} MB

Next:
  {command} predict --config configs/quickstart.yaml --ckpt_path {CHECKPOINT}
  {command} fit --config configs/quickstart.yaml --peft.method.target_modules "[query,value]"
  .venv/bin/python examples/existing_project.py""")


if __name__ == "__main__":
    main()
