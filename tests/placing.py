"""A method that puts adapters where a test says, and adapters whose effect can be told at sight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import InputAdapter, OutputAdapter, WeightAdapter
from lightning_peft.core.method import Method, Placement, Plan


@dataclass(frozen=True, kw_only=True)
class Place(Method):
    """Puts one new adapter at each path."""

    adapters: dict[str, Callable[[], nn.Module]]
    modules_to_save: list[str] | str | None = None

    def plan(self, model: nn.Module, saved: Sequence[str]) -> Plan:
        return Plan([Placement(path, make()) for path, make in self.adapters.items()])  # type: ignore[arg-type]


class Scale(OutputAdapter):
    """Multiplies the host's output."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * self.factor


class Shift(OutputAdapter):
    """Adds to the host's output."""

    def __init__(self, amount: float = 1.0) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(amount))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.amount


class ScaleInput(InputAdapter):
    """Multiplies every tensor that the host is called with."""

    def __init__(self, factor: float = 3.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(x * self.factor for x in args), {key: x * self.factor for key, x in kwargs.items()}


class ScaleWeight(WeightAdapter):
    """Multiplies parameters or buffers of the host."""

    def __init__(self, *names: str, factor: float = 5.0) -> None:
        super().__init__()
        self.names = names
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, weight: Tensor, name: str) -> Tensor:
        return weight * self.factor


class ShiftWeight(WeightAdapter):
    """Adds to parameters or buffers of the host."""

    def __init__(self, *names: str, amount: float = 1.0) -> None:
        super().__init__()
        self.names = names
        self.amount = nn.Parameter(torch.tensor(amount))

    def forward(self, weight: Tensor, name: str) -> Tensor:
        return weight + self.amount
