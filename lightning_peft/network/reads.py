"""Weights that a module's class reads off the modules below it: ``x @ self.embedding.weight.T``.

What acts on a layer's output, or while its own forward runs, is nothing to such a reader. It is found in the source of
what the class's forward calls on itself; questions (``self.fc.weight.dtype``, ``isinstance(self.fc.weight, Tensor)``)
are no reads. Readers outside of the class are not seen, nor methods that others call.
"""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from textwrap import dedent
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from lightning_peft.network.source import Chains
from lightning_peft.network.walk import Beside, is_wrapper, join, modules_outside

_TENSORS = frozenset({"weight", "bias"})
_ALL = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
_QUESTIONS = frozenset(
    {"device", "dim", "dtype", "element_size", "grad", "is_cuda", "is_meta", "is_sparse", "ndim", "numel", "shape"}
    | {"requires_grad", "size", "type", "untyped_storage", "data_ptr", "is_floating_point"}
)
_MAKING = re.compile("^_|init|reset|tie|load|save|resize|configure|repr")
_OTHERS = frozenset({"torch", "builtins", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_peft"})


@dataclass(frozen=True)
class Read:
    """Tensors of one module that another one, above it, reads."""

    path: str
    """The path of the module below, from the reader."""
    names: tuple[str, ...]
    """``weight``, ``bias`` or both."""
    only: bool
    """True if the reader does nothing else with the module."""
    writes: bool = False
    """True if the reader writes into the tensors, too."""


def reads_of(module: nn.Module) -> list[tuple[Read, nn.Module]]:
    """What ``module`` reads off modules below, with each of these."""
    if not module._modules:
        return []
    found, own = [], vars(module).get("forward")
    # Somebody's own forward of this one module; what adapters hold runs that of the class.
    given = own.__func__ if isinstance(own, MethodType) and own.__self__ is module else None
    for read in _reads(type(module), given or type(module).forward):  # type: ignore[arg-type]  # functions are hashable
        for path, below in _resolved(module, read.path.split(".")):
            names = tuple(name for name in read.names if below._parameters.get(name) is not None)
            if names:
                found.append((Read(path, names, read.only, read.writes), below))
    return found


def only_read(model: nn.Module) -> set[int]:
    """The modules below ``model``, by their ids, whose forward never runs: all that hold them do is read."""
    read: set[int] = set()
    called: set[int] = set()
    for _, module in modules_outside(model):
        if is_wrapper(module) or type(module) in (nn.ModuleList, nn.ModuleDict):  # these run nothing
            continue
        alone = {id(below) for found, below in reads_of(module) if found.only}
        read |= alone
        called |= {id(child) for child in module._modules.values()} - alone
    return read - called


def _resolved(module: nn.Module, parts: list[str], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    if is_wrapper(module):
        (name, inner), *_ = module._modules.items()
        assert inner is not None
        yield from _resolved(inner, parts, join(path, name))
    elif not parts:
        yield path, module
    else:
        for name, child in module._modules.items():
            if child is not None and parts[0] in (name, Chains.EACH) and not isinstance(child, Beside):
                yield from _resolved(child, parts[1:], join(path, name))


@cache
def _reads(kind: type[nn.Module], forward: Any) -> tuple[Read, ...]:
    """What the forward of a class reads, and what it calls on itself."""
    names: dict[str, set[str]] = {}
    used: set[str] = set()
    written: set[str] = set()
    functions = list(_reached(kind, forward))
    if not any(_TENSORS & _words(function.__code__) for function in functions):
        return ()  # as nearly always; to read the source takes a hundred times as long
    for path, name, changes in (found for function in functions for found in _found(function)):
        if not name:
            used.add(path)
        elif changes:
            written.add(path)
        else:
            names.setdefault(path, set()).add(name)
    return tuple(
        Read(path, tuple(sorted(found)), not any(_is_in(path, top) for top in used), path in written)
        for path, found in names.items()
    )


def _found(function: FunctionType) -> Iterator[tuple[str, str, bool]]:
    """What a function does with modules below: (path, name of a tensor or empty, whether it writes into that)."""
    for parts, changes in _chains(function):
        at = next((i for i, part in enumerate(parts) if i and part in _TENSORS), None)
        if at is None:
            yield "" if parts[0] in _ALL else ".".join(parts), "", changes
        elif changes or not _QUESTIONS.intersection(parts[at + 1 : at + 2]):
            yield ".".join(parts[:at]), parts[at], changes


def reads_beside(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What methods of somebody's class read that its forward does not come to: (name of the method, module below).

    Methods of transformers, and those that make, tie, load or save weights, are meant to read the base's.
    """
    for name, paths in _reads_beside(type(module)) if module._modules else ():  # type: ignore[arg-type]
        for path in paths:
            yield from ((name, below) for _, below in _resolved(module, path.split(".")))


@cache
def _reads_beside(kind: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _OTHERS | {"transformers"}]
    own = {name: _function(value) for base in reversed(bases) for name, value in vars(base).items()}
    reached = set(_reached(kind, kind.forward))
    return tuple(
        (name, tuple(dict.fromkeys(path for path, tensor, changes in _found(function) if tensor and not changes)))
        for name, function in own.items()
        if function is not None and function not in reached and not _MAKING.search(name)
        if _TENSORS & _words(function.__code__)
    )


@cache
def words_of(kind: Any) -> frozenset[str]:
    """The names of attributes in the functions that the forward of a class comes to."""
    return frozenset().union(*(_words(function.__code__) for function in _reached(kind, kind.forward)))


def _is_in(path: str, top: str) -> bool:
    return not top or f"{path}.".startswith(f"{top}.")


def _reached(kind: type[nn.Module], forward: Any) -> Iterator[FunctionType]:
    """The functions of a class, and of its bases, that its forward comes to; torch's own left out."""
    seen, defined = {"forward"}, _defined(kind, "forward")
    # Or one that was given to this module alone.
    given = not any(vars(base).get("forward") is forward for base in kind.__mro__)
    waiting = [[forward] if given else defined]
    while waiting:
        for function in filter(None, map(_function, waiting.pop())):
            yield function
            words = _words(function.__code__)
            waiting += [_defined(kind, name) for name in words - seen]
            seen |= words
            # Bases are asked by super(), or by their names.
            if not words & {"super", *(base.__name__ for base in kind.__mro__[1:])}:
                break


def _defined(kind: type, name: str) -> list[Any]:
    """What a class and its bases, torch's left out, have under ``name``."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _OTHERS]
    return [vars(base)[name] for base in bases if name in vars(base)]


def _function(attribute: Any) -> FunctionType | None:
    for inner in ("fget", "__func__", "func"):  # of properties, class methods and cached properties
        attribute = getattr(attribute, inner, None) or attribute
    function = inspect.unwrap(attribute) if callable(attribute) else None
    return function if isinstance(function, FunctionType) else None


def _words(code: CodeType) -> set[str]:
    """The names of attributes in a function, and in the functions inside it."""
    inside = [_words(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inside)


def _chains(function: FunctionType) -> Iterable[tuple[tuple[str, ...], bool]]:
    """What a function does with the attributes of its first argument."""
    try:
        (tree,) = ast.parse(dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, ValueError):  # written in a console, for one
        return ()
    if not isinstance(tree, ast.FunctionDef) or not (arguments := [*tree.args.posonlyargs, *tree.args.args]):
        return ()
    return Chains(tree, arguments[0].arg)
