"""What merging has done, layer by layer."""

from dataclasses import dataclass
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table

_LOSSY = 0.1


@dataclass(frozen=True)
class MergedLayer:
    """One weight that an adapter was folded into."""

    path: str
    """Its name in the model."""
    dtype: torch.dtype
    """What it is rounded to."""
    largest_loss: float
    """The largest rounding error, as a share of the largest change of an entry."""
    mean_loss: float
    """The mean rounding error, as a share of the mean change of an entry."""


@dataclass(frozen=True)
class MergeReport:
    """How much of an adapter rounding has taken. ``str`` and ``rich.print`` show it as a table."""

    layers: tuple[MergedLayer, ...]

    @property
    def lossy(self) -> tuple[MergedLayer, ...]:
        """The layers that have lost more than 10 % of the change on average."""
        return tuple(layer for layer in self.layers if layer.mean_loss > _LOSSY)

    def __rich__(self) -> Table:
        table = Table(title="Merged", title_justify="left", title_style="bold")
        table.add_column("weight", overflow="fold")  # a name that is cut tells nothing
        table.add_column("dtype")
        table.add_column("largest loss", justify="right")
        table.add_column("mean loss", justify="right")
        for layer in self.layers:
            dtype = str(layer.dtype).removeprefix("torch.")
            table.add_row(layer.path, dtype, f"{layer.largest_loss:.2%}", f"{layer.mean_loss:.2%}")
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue().rstrip()
