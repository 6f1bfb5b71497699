"""The time that an import takes, each in a process of its own."""

import subprocess
import sys

from .measuring import interleaved, ratio
from .table import table

_PACKAGES = ("torch", "lightning_peft", "transformers", "peft", "lightning")


def measure(rounds: int) -> str:
    """The table of some imports, all beside ``import torch``; what is not installed is left out."""
    runs = {name: (lambda name=name: _run(name)) for name in _PACKAGES if not _run(name)}
    seconds = interleaved(runs, rounds, warmup=0)
    rows = [
        [f"import {name}", f"{ratio(own, seconds['torch']):.2f}", f"{sorted(own)[len(own) // 2]:.2f}"]
        for name, own in seconds.items()
    ]
    return table(("", "÷ import torch", "s"), rows)


def _run(package: str) -> int:
    script = f"import torch, {package}" if package != "lightning" else "import torch, lightning.pytorch"
    return subprocess.run([sys.executable, "-c", script], capture_output=True).returncode
