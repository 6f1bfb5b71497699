"""What a module is called with and what it returns: arguments by name, and the tensor among whatever comes along."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

Call = dict[str, Any]
"""The arguments of one call by name."""
LENGTHS = ("cache_length", "past_key_values_length")
"""Names of arguments that say how many tokens are in a cache."""


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of what ``module.forward`` takes, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def code_names(module: nn.Module) -> tuple[str, ...]:
    """The names that the code of ``type(module).forward`` uses, of whatever is not its own."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code.co_names if code else ()


def bound(names: Sequence[str], args: tuple[Any, ...], kwargs: Call) -> Call:
    """All arguments of a call by name, positional ones too."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


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


def takes_positions(module: nn.Module) -> bool:
    """True if ``module`` is told where its tokens stand, and is no layer that hands this on beside its input."""
    names = argument_names(module)
    return "hidden_states" not in names and any(name in names for name in ("position_ids", *LENGTHS))


def numbers_tokens(module: nn.Module) -> bool:
    """True if ``module`` is a stack of transformers blocks that numbers its tokens on from what is in its cache."""
    return {"arange", "get_seq_length"} <= set(code_names(module)) and "position_ids" in argument_names(module)


def batch_dim(module: nn.Module) -> int:
    """The dimension that counts the sequences in what ``module`` is called with: 1 where torch's attention says so."""
    return int(any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in module.modules()))
