"""Which adapter each row of a batch gets, as a tensor: for adapters that act on several rows at once."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class AdapterIndex:
    """Which of some adapters each row of a batch gets.

    Args:
        rows: (rows,), the place of the row's adapter among them; behind the last one stands "none".
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], _T]) -> _T:
        """What ``make`` makes of this index, kept under ``key``: the layers of a model mostly need the same."""
        return made_once(self._made, key, make)


def made_once(made: dict[Any, Any], key: Any, make: Callable[[], _T]) -> _T:
    """What ``made`` has under ``key``, which ``make`` makes when it is first wanted."""
    if key not in made:
        with torch.inference_mode(False), torch.no_grad():  # kept, and later saved for a backward pass
            made[key] = make()
    found: _T = made[key]
    return found
