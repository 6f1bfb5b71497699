"""What one adapter of a forward pass hands to another one that acts later in it."""

from typing import Any

from lightning_peft.core.adapter import InputAdapter
from lightning_peft.network.calls import first_input


class Tap:
    """A place for one value, filled by one adapter and emptied by another. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self.value: Any = None

    def take(self) -> Any:
        """The value; nothing is left behind that would keep its graph alive."""
        value, self.value = self.value, None
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"value": None}


class Capture(InputAdapter):
    """Puts the host's first input into a tap, and changes nothing."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap = tap

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.tap.value = first_input(args, kwargs)
        return args, kwargs
