"""What an adapter directory holds, as data and as a table for the screen."""

from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_peft.checkpoints.directory import Directory, read_directory
from lightning_peft.checkpoints.peft.state import PROMPT, listed
from lightning_peft.checkpoints.save_load import prepare
from lightning_peft.errors import PEFTError
from lightning_peft.injection.registry import registries


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """An adapter directory. ``str`` and ``rich.print`` show it as a table."""

    path: str
    method: str
    """Name of the method; of a directory of the peft package, its ``peft_type``."""
    config: dict[str, Any]
    """The method as primitives; of a directory of the peft package, its config."""
    places: tuple[str, ...]
    """Paths of the adapted modules; of a directory of the peft package, what its config names."""
    modules_to_save: tuple[str, ...]
    """Paths of the modules that were fully trained, or what the config names."""
    tensors: int
    parameters: int
    """Numbers in the tensors, without the ones that only peft needs."""
    size: int
    """Bytes of all files together."""
    written_here: bool
    """True if this library wrote it, so that its base is known and every file has been checked."""
    base_tensors: int | None
    """How many tensors the base has; None where nothing is known of it."""
    base_parameters: int | None
    misfit: str | None
    """Why it cannot be loaded into the given model; empty where it can, None where no model was given."""

    @property
    def fits(self) -> bool | None:
        """True if it can be loaded into the given model; None where none was given."""
        return None if self.misfit is None else not self.misfit

    def __rich__(self) -> Table:
        table = Table(title=self.path, title_justify="left", title_style="bold", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        known = f"{self.base_tensors} tensors, {self.base_parameters:,} parameters" if self.base_tensors else "unknown"
        rows = {
            "Method": self.method,
            "Settings": ", ".join(f"{key}={value!r}" for key, value in self.config.items() if _told(key, value)),
            "Places": _several(self.places),
            "Fully trained": _several(self.modules_to_save),
            "Tensors": f"{self.tensors} ({self.parameters:,} numbers), {self.size:,} bytes in all",
            "Written by": "lightning_peft, checksums hold" if self.written_here else "peft",
            "Base": known,
        }
        # An empty reason says that it fits; None says that nobody asked.
        if self.misfit is not None:
            rows["Fits the model"] = f"no: {self.misfit}" if self.misfit else "yes"
        for name, value in rows.items():
            table.add_row(name, value)
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=100, color_system=None).print(self.__rich__())
        return text.getvalue().rstrip()


def inspect_adapter(path: str | Path, model: nn.Module | None = None) -> AdapterSummary:
    """Describe the adapter directory ``path``, and whether it could be loaded into ``model``, which is only read.

    Raises:
        CheckpointError: there is none, it is damaged, or it was edited after it had been written.
    """
    directory = read_directory(path)
    manifest, tensors = directory.manifest, directory.tensors
    if directory.trained is not None:  # of peft's file, what was computed for it does not count
        tensors = {**{key: t for key, t in tensors.items() if key != PROMPT}, **directory.trained}
    # What peft wrote is shown in peft's words.
    config = dict(directory.config) if directory.method is None else directory.method.to_config()
    shapes = manifest["base"]["shapes"] if manifest else None
    return AdapterSummary(
        path=str(path),
        method=str(config.pop("peft_type", None) if directory.method is None else config.pop("method")),
        config=config,
        places=tuple(
            dict.fromkeys(place.partition(":")[0] for place in manifest["places"])
            if manifest
            else sorted(listed(config, "target_modules"))
        ),
        modules_to_save=tuple(manifest["modules_to_save"] if manifest else listed(config, "modules_to_save")),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        size=directory.size,
        written_here=manifest is not None,
        base_tensors=None if shapes is None else len(shapes),
        base_parameters=None if shapes is None else sum(torch.Size(shape).numel() for shape in shapes),
        misfit=None if model is None else _misfit(model, directory),
    )


def _misfit(model: nn.Module, directory: Directory) -> str:
    """Why ``directory`` cannot be loaded into ``model``, beside what it carries; empty if it can."""
    taken = {name for _, _, registry in registries(model) for name in registry.attachments}
    name = next(f"inspected{i or ''}" for i in range(len(taken) + 1) if f"inspected{i or ''}" not in taken)
    try:
        with torch.random.fork_rng():
            prepare(model, directory, name)
    except PEFTError as error:
        return str(error)
    return ""


def _told(name: str, value: object) -> bool:
    """True if a setting says something that the other rows of the table do not."""
    return value not in (None, False, [], {}) and name not in ("target_modules", "modules_to_save")


def _several(paths: tuple[str, ...]) -> str:
    shown = ", ".join(paths[:4])
    return f"{shown} and {len(paths) - 4} more" if len(paths) > 4 else shown or "-"
