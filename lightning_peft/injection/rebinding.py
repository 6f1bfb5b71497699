"""Functions that hold one object, made anew for another one.

Libraries and users put functions of their own in place of a module's forward: bound methods, partials, decorated
functions, closures, objects that are called. Somewhere in them is the module, or its forward.
"""

import copy
import types
from functools import partial
from typing import Any

from torch import nn

_DEPTH = 8  # decorators on decorators


def rebound(function: Any, old: Any, new: Any, depth: int = _DEPTH) -> Any:
    """``function`` with ``new`` wherever it holds ``old``; itself where it does not.

    Args:
        function: anything that is called.
        old: what it holds: a module, or what is called as its forward.
        new: what it is to hold.
        depth: how deep to look.
    """
    if function is old:
        return new
    if depth == 0 or isinstance(function, (type, nn.Module, types.ModuleType)):
        return function
    if isinstance(function, types.MethodType):
        owner = rebound(function.__self__, old, new, depth - 1)
        return function if owner is function.__self__ else types.MethodType(function.__func__, owner)
    if isinstance(function, partial):
        called = rebound(function.func, old, new, depth - 1)
        args = [rebound(value, old, new, depth - 1) for value in function.args]
        keywords = {name: rebound(value, old, new, depth - 1) for name, value in function.keywords.items()}
        changed = called is not function.func or any(a is not b for a, b in zip(args, function.args, strict=True))
        changed |= any(keywords[name] is not value for name, value in function.keywords.items())
        return partial(called, *args, **keywords) if changed else function
    if isinstance(function, types.FunctionType):
        return _function(function, old, new, depth)
    if callable(getattr(type(function), "bound_to", None)) and getattr(function, "host", None) is old:
        return function.bound_to(new)
    # An object that is called, and holds what it calls.
    own = getattr(function, "__dict__", None)
    if not callable(function) or not own:
        return function
    made = {name: rebound(value, old, new, depth - 1) for name, value in own.items()}
    if all(made[name] is value for name, value in own.items()):
        return function
    twin = copy.copy(function)
    vars(twin).update(made)
    return twin


def holds(function: Any, held: Any) -> bool:
    """True if ``function`` holds ``held``, as :func:`rebound` finds it."""
    return rebound(function, held, lambda: None) is not function


def _function(function: types.FunctionType, old: Any, new: Any, depth: int) -> types.FunctionType:
    def contents(cell: types.CellType) -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # it is not filled yet
            return None

    cells, defaults = function.__closure__ or (), function.__defaults__ or ()
    held = [rebound(contents(cell), old, new, depth - 1) for cell in cells]
    given = tuple(rebound(value, old, new, depth - 1) for value in defaults)
    named = {name: rebound(value, old, new, depth - 1) for name, value in (function.__kwdefaults__ or {}).items()}
    changed = any(a is not contents(b) for a, b in zip(held, cells, strict=True))
    changed |= any(a is not b for a, b in zip(given, defaults, strict=True))
    changed |= any(named[name] is not value for name, value in (function.__kwdefaults__ or {}).items())
    if not changed:
        return function
    # Cells that nothing is changed in stay shared: a counter in a closure counts on.
    closure = tuple(
        cell if value is contents(cell) else types.CellType(value) for value, cell in zip(held, cells, strict=True)
    )
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, given or None, closure)
    made.__kwdefaults__ = named or None
    made.__dict__.update(function.__dict__)
    return made
