"""The tensor that a module is called with, and the one that it returns, whatever comes along with them."""

from typing import Any


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first thing a module was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def with_first_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another first input."""
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): value})


def first_output(output: Any) -> Any:
    """The tensor of an output, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_first_output(output: Any, value: Any) -> Any:
    """The same output with another tensor in its (first) place."""
    if not isinstance(output, (tuple, list)):
        return value
    make = getattr(type(output), "_make", type(output))  # a named tuple takes its fields one by one
    return make((value, *output[1:]))
