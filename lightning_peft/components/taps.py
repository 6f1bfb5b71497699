"""What one adapter of a forward pass hands to another one, of another host, that acts later in it."""

import threading
from typing import Any

from lightning_peft.core.adapter import InputAdapter
from lightning_peft.network.calls import first_input


class _PerThread(threading.local):
    """A dictionary for each thread: compiled code silently loses what hooks assign to a ``threading.local`` itself."""

    def __init__(self) -> None:  # in each thread that comes
        self.values: dict[str, Any] = {}


class Tap:
    """A place for one value, filled by one adapter and emptied by another. Copies and pickles of it are empty.

    Each thread has a value of its own, since between the two adapters a forward stays on its thread and no other one
    begins there. Not in a context variable, which compiled code cannot read.
    """

    def __init__(self) -> None:
        self._local = _PerThread()

    def put(self, value: Any) -> None:
        """Hand ``value`` on."""
        self._local.values["value"] = value

    def take(self) -> Any:
        """The value, None if there is none; nothing is left behind that would keep its graph alive."""
        return self._local.values.pop("value", None)

    def __reduce__(self) -> Any:
        return Tap, ()


class Capture(InputAdapter):
    """Puts the host's first input into a tap, and changes nothing."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap = tap

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.tap.put(first_input(args, kwargs))
        return args, kwargs
