"""What is done with adapters beside training: injecting, switching, merging, saving, loading."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import nn

import lightning_peft
from lightning_peft import LoRA, activate, inject, merged

from .measuring import interleaved, ratio
from .shapes import _llama
from .table import table

_BUILD = _llama(128, 24, 352, 4, 4, 1024)  # 168 linear layers
_CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def measure(device: str, rounds: int) -> str:
    """The table of both libraries."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = _runs(device, Path(folder))
        seconds = interleaved({f"{name} {i}": run for name, pair in runs.items() for i, run in enumerate(pair)}, rounds)
    rows = []
    for name in runs:
        ours, theirs = seconds[f"{name} 0"], seconds[f"{name} 1"]
        medians = (f"{sorted(s)[len(s) // 2] * 1000:,.1f}" for s in (ours, theirs))
        rows.append([name, f"{ratio(ours, theirs):.3f}", *medians])
    return table(("24 layers, 168 linear layers", "ours ÷ peft", "ours ms", "peft ms"), rows)


def _runs(device: str, folder: Path) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Each task as done by us and by peft."""
    ours, theirs = _bare(device), peft.get_peft_model(_bare(device), peft.LoraConfig(**_CONFIG))
    for name in ("one", "two"):
        inject(ours, LoRA(r=8, alpha=16), name)
        theirs.add_adapter(name, peft.LoraConfig(**_CONFIG))
    turns = [0, 0]

    def switch(which: int, to: Callable[[str], object]) -> object:
        turns[which] += 1
        return to(("one", "two")[turns[which] % 2])

    def merge_ours() -> None:
        activate(ours, "one")
        with merged(ours, "one"):
            pass

    def merge_theirs() -> None:
        theirs.set_adapter("one")
        theirs.merge_adapter(["one"])
        theirs.unmerge_adapter()

    bare = [_Fresh(device), _Fresh(device)]
    runs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "inject": (
            lambda: inject(bare[0].take(), LoRA(r=8, alpha=16)),
            lambda: peft.get_peft_model(bare[1].take(), peft.LoraConfig(**_CONFIG)),
        ),
        "switch": (
            lambda: switch(0, lambda name: activate(ours, name)),
            lambda: switch(1, lambda name: theirs.set_adapter(name)),
        ),
        "merge and take back": (merge_ours, merge_theirs),
    }
    if hasattr(lightning_peft, "save_adapter"):
        lightning_peft.save_adapter(ours, folder / "ours", "one")
        runs["save"] = (
            lambda: lightning_peft.save_adapter(ours, folder / "ours", "one"),
            lambda: theirs.save_pretrained(folder / "theirs", selected_adapters=["one"]),
        )
        theirs.save_pretrained(folder / "theirs", selected_adapters=["one"])
        runs["load"] = (
            lambda: lightning_peft.load_adapter(bare[0].take(), folder / "ours"),
            lambda: peft.PeftModel.from_pretrained(bare[1].take(), folder / "theirs" / "one"),
        )
    return runs


def _bare(device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return _BUILD()


class _Fresh:
    """Models without an adapter, made before the clock runs."""

    def __init__(self, device: str, count: int = 40) -> None:
        template = _bare(device)
        self._models = [_twin(template) for _ in range(count)]

    def take(self) -> nn.Module:
        return self._models.pop()


def _twin(model: nn.Module) -> nn.Module:
    """A copy of its modules around the same weights, which no adapter changes."""
    import copy

    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
