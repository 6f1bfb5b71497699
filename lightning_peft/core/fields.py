"""Fields of methods: the words for their annotations, and the one check of values against them.

``r: Count = 8`` says all that a value has to fulfil by itself. The check reads it when a method is made, ``--help`` of
the command shows it, and what fields have to fulfil together is left to the method's ``__post_init__``.
"""

import math
import reprlib
import types
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, repr=False)
class Must:
    """What a value must be, beside being of the type that it is annotated with."""

    words: str
    """Ends the sentence "the field must be"."""
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:
        return self.words


Count = Annotated[int, Must("at least 1 and whole", lambda n: n >= 1)]
Probability = Annotated[float, Must("a probability: at least 0, less than 1", lambda p: 0 <= p < 1)]
Finite = Annotated[float, Must("a finite number", lambda x: math.isfinite(x))]
Positive = Annotated[float, Must("a number greater than 0", lambda x: 0 < x < math.inf)]
NotNegative = Annotated[float, Must("a number, at least 0", lambda x: 0 <= x < math.inf)]
Patterns = Annotated[
    list[str] | str | None,
    Must("a non-empty string or a list of them", lambda v: v is None or (v != "" and all(v))),
]
Layers = Annotated[
    list[int] | None, Must("a list of layer indices, or None for all", lambda v: v is None or len(v) > 0)
]


@cache
def declared_fields(cls: type) -> Mapping[str, Any]:
    """The annotations of a dataclass by field; empty where they use names that only a type checker imports."""
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError:
        return {}
    return {name: hints[name] for name in getattr(cls, "__dataclass_fields__", {})}


def fits(value: Any, declared: Any) -> bool:
    """True if ``value`` is what an annotation ``declared`` says.

    A whole number is a float too, true and false are no numbers, and any kind of sequence or set stands for any other,
    as files know lists alone. Annotations that say nothing here (Any, type variables) fit everything.
    """
    origin, inner = get_origin(declared), get_args(declared)
    if origin is Annotated:
        kind, *conditions = inner
        return fits(value, kind) and all(c.holds(value) for c in conditions if isinstance(c, Must))
    if declared is Any:
        return True
    if declared is None or declared is type(None):
        return value is None
    # Before the plain types: a union has no class to test for.
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
    # Text is a sequence too, and never meant as one.
    if issubclass(kind, (Sequence, Set)):
        return isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)) and _items_fit(value, inner)
    return isinstance(value, kind)


def expected(declared: Any, value: Any = None) -> str:
    """What an annotation asks for, to end the sentence "the field must be"; of a mapping, what ``value`` lacks."""
    origin, inner = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return next((c.words for c in inner if isinstance(c, Must)), expected(inner[0]))
    if origin in (Union, types.UnionType):
        return ", or ".join(expected(one, value) for one in sorted(inner, key=lambda one: one is type(None)))
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if inner and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return "a mapping"
        # One of the two is wrong: the values, unless a key is.
        keyed = all(fits(key, inner[0]) for key in value)
        return expected(inner[1]) if keyed else f"keyed by {expected(inner[0])}s".replace("a ", "")
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}
    return words.get(declared) or (declared.__name__ if isinstance(declared, type) and not inner else str(declared))


def oversized(value: Any) -> bool:
    """True if a whole number in ``value`` has more than the 64 bits that torch takes."""
    if isinstance(value, int):
        return value.bit_length() > 63
    if isinstance(value, Mapping):
        return any(map(oversized, value.values()))
    return isinstance(value, (list, tuple)) and any(map(oversized, value))


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
