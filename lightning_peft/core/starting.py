"""Adapters that start with values of their own, and adapters that wait for the values of a file.

The start of a method (draw, look up, decompose a weight, ask a tokenizer) is wasted where a file brings the values. A
method whose start is costly, or wants something that need not be there any more, asks :func:`starts`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_STARTS: ContextVar[bool] = ContextVar("lightning_peft_starts", default=True)


def starts() -> bool:
    """True if the adapters that are planned now start with values of their own; of others only shapes matter."""
    return _STARTS.get()


@contextmanager
def for_a_file() -> Iterator[None]:
    """Within the ``with`` block, adapters are planned for values of a file."""
    token = _STARTS.set(False)
    try:
        yield
    finally:
        _STARTS.reset(token)
