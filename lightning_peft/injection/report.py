"""What was injected, what trains and what is frozen, as data and as a table for the screen."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_peft.components.tuned import FullyTrainedParameters
from lightning_peft.injection.registry import registries
from lightning_peft.network.quantized.weights import packed_sizes
from lightning_peft.network.walk import base_children, base_modules, join, starred, within


@dataclass(frozen=True)
class HostRow:
    """One adapter on one host."""

    host: str
    """Path of the host module from the reported model."""
    host_type: str
    adapter: str
    """Name of the adapter."""
    adapter_type: str
    """The method that planned it, or ``"fully trained"``."""
    trainable: int


@dataclass(frozen=True)
class PartRow:
    """One top-level part of the base."""

    path: str
    parameters: int
    state: str
    """``"frozen"``, ``"frozen, adapted"`` or ``"fully trained"``."""


@dataclass(frozen=True)
class Report:
    """The state of a model with adapters. ``str`` and ``rich.print`` show it as a table."""

    hosts: tuple[HostRow, ...]
    parts: tuple[PartRow, ...]
    left_out: tuple[tuple[str, str], ...]
    """Layers that an automatic choice passed over: (name, reason)."""
    notes: tuple[str, ...]
    """What else is to be known of an adapter."""
    trainable: int
    """Parameters that train."""
    total: int
    """All parameters, adapters included; of a quantized weight the numbers that it stands for."""

    @property
    def share(self) -> float:
        """``trainable / total``, from 0 to 1."""
        return self.trainable / self.total if self.total else 0.0

    def __rich__(self) -> RenderableType:
        adapters = Table(title="Adapters", title_justify="left", title_style="bold")
        for column in ("Layers", "Type", "Adapter"):
            adapters.add_column(column, overflow="fold")
        adapters.add_column("Count", justify="right")
        adapters.add_column("Trains", justify="right")
        for (pattern, host_type, adapter), count, trainable in self._grouped():
            adapters.add_row(pattern, host_type, adapter, str(count), f"{trainable:,}")
        parts = Table(title="Base", title_justify="left", title_style="bold")
        parts.add_column("Part", overflow="fold")
        parts.add_column("Parameters", justify="right")
        parts.add_column("State")
        for part in self.parts:
            parts.add_row(part.path, f"{part.parameters:,}", part.state)
        left_out = Counter((starred(name), reason) for name, reason in self.left_out)
        lines = [
            Text(f"left out: {name}{f' ({count})' if count > 1 else ''}: {reason}")
            for (name, reason), count in left_out.items()
        ]
        lines += [Text(note) for note in self.notes]
        # The one line that everybody looks for, so it stands last.
        total = Text(f"{self.trainable:,} of {self.total:,} parameters train ({self.share:.2%})", style="bold")
        return Group(adapters, parts, *lines, total)

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=100, color_system=None).print(self.__rich__())
        return text.getvalue().rstrip()

    def _grouped(self) -> Iterator[tuple[tuple[str, str, str], int, int]]:
        """Rows that differ in layer numbers alone become one."""
        several = len({row.adapter for row in self.hosts}) > 1  # one adapter's name says nothing
        count: Counter[tuple[str, str, str]] = Counter()
        trainable: Counter[tuple[str, str, str]] = Counter()
        for row in self.hosts:
            pattern = starred(row.host) or "(the whole model)"
            key = (pattern, row.host_type, f"{row.adapter}: {row.adapter_type}" if several else row.adapter_type)
            count[key] += 1
            trainable[key] += row.trainable
        for key, number in count.items():
            yield key, number, trainable[key]


def report(model: nn.Module) -> Report:
    """Describe the adapters at or below ``model``."""
    hosts: list[HostRow] = []
    left_out: list[tuple[str, str]] = []
    notes: list[str] = []
    fully_trained: set[str] = set()
    for prefix, owner, registry in registries(model):
        kinds = {path: type(owner.get_submodule(path)).__name__ for path in registry.slots}
        for name, attachment in registry.attachments.items():
            for path, part, adapter in registry.parts(name):
                parameters = list(adapter.parameters())
                if not parameters:
                    continue  # it only hands on what another one needs
                whole = isinstance(adapter, FullyTrainedParameters)
                kind = "fully trained" if whole else type(attachment.method.planner_of(part)).__name__
                trainable = sum(p.numel() for p in parameters if p.requires_grad)
                hosts.append(HostRow(join(prefix, path), kinds[path], name, kind, trainable))
            notes += [f"{type(attachment.method).__name__} {name!r}: {note}" for note in attachment.notes]
            left_out += [(join(prefix, path), reason) for path, reason in attachment.left_out]
            fully_trained.update(join(prefix, path) for path in attachment.fully_trained)
    parameters, packed = list(model.parameters()), packed_sizes(model)
    return Report(
        hosts=tuple(hosts),
        parts=tuple(_parts(model, {row.host for row in hosts}, fully_trained, packed)),
        left_out=tuple(left_out),
        notes=tuple(notes),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(packed.get(id(p), p.numel()) for p in parameters),
    )


def _parts(model: nn.Module, adapted: set[str], fully_trained: set[str], packed: dict[int, int]) -> Iterator[PartRow]:
    """The outermost parts of the base: the children of the first module that has more than one with parameters."""
    path, children = "", base_children(model)
    while len(children) == 1 and len(base_children(children[0][1])) > 0:
        path, children = join(path, children[0][0]), base_children(children[0][1])
    for name, child in children:
        part = join(path, name)
        # Each parameter once: tied ones would count twice.
        modules = (module for _, module in base_modules(child))
        own = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
        inside = any(within(host, [part]) for host in adapted)
        whole = within(part, fully_trained)
        state = "fully trained" if whole else "frozen, adapted" if inside else "frozen"
        yield PartRow(part, sum(packed.get(id(p), p.numel()) for p in own.values()), state)
