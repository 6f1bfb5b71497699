"""Tensors of a stand-in that are computed when they are read."""

from collections.abc import Callable
from typing import Any


class Later:
    """A tensor that is computed when it is read."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.compute = compute


class LazyTable(dict[str, Any]):
    """The parameters or buffers of a stand-in, some of which come later.

    Each read computes anew: one may be under ``no_grad`` or autocast, or be the second time in a backward pass that
    computes a forward again.
    """

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value.compute() if type(value) is Later else value

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]
