"""Fields of methods: what their annotations declare, for values that come from files."""

import reprlib
import types
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, declared: Any) -> bool:
    """True if ``value`` is of the ``declared`` type, as an annotation names it.

    A whole number is a float too, true and false are no numbers, and any kind of sequence or set stands for any other,
    as files know lists alone. Annotations that say nothing here (Any, type variables) fit everything.
    """
    origin, inner = get_origin(declared), get_args(declared)
    if declared is Any:
        return True
    if declared is None or declared is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    kind = origin or declared
    if not isinstance(kind, type):
        return True
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind is str or kind is bool:
        return isinstance(value, kind)
    if issubclass(kind, Mapping):
        pairs = inner or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, pairs[0]) and fits(v, pairs[1]) for k, v in value.items())
    if issubclass(kind, (Sequence, Set)):
        return isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)) and _items_fit(value, inner)
    return isinstance(value, kind)


def named(declared: Any) -> str:
    """The annotation as a user writes it."""
    return declared.__name__ if isinstance(declared, type) and not get_args(declared) else str(declared)


def shown(value: Any) -> str:
    """A value for a message: short, and whatever it is."""
    try:
        return reprlib.repr(value)
    except (ValueError, RecursionError):  # Python does not print numbers of over 4,300 digits
        return f"a {type(value).__name__} that cannot be printed"


def _items_fit(items: Collection[Any], inner: tuple[Any, ...]) -> bool:
    if len(inner) > 1 and Ellipsis not in inner:  # a tuple of so many
        return len(items) == len(inner) and all(map(fits, items, inner))
    return all(fits(item, inner[0]) for item in items) if inner else True
