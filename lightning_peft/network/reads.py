"""Weights that a module's class reads off the modules below it: ``x @ self.embedding.weight.T``.

What acts on a layer's output, or while its own forward runs, is nothing to such a reader. It is found in the source of
what the class's forward calls on itself; questions (``self.fc.weight.dtype``, ``isinstance(self.fc.weight, Tensor)``)
are no reads. Readers outside of the class are not seen.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from textwrap import dedent
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from lightning_peft.network.walk import Beside, join

_TENSORS = frozenset({"weight", "bias"})
_QUESTIONS = frozenset(
    {"data", "device", "dim", "dtype", "element_size", "grad", "is_cuda", "is_meta", "is_sparse", "ndim", "numel"}
    | {"requires_grad", "shape", "size", "type", "untyped_storage", "data_ptr", "is_floating_point"}
)
_ASKING = frozenset({"isinstance", "hasattr", "id", "type", "len"})
_OTHERS = frozenset({"torch", "builtins", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_peft"})
_EACH = "*"  # in place of the name of a child that is chosen by an index


@dataclass(frozen=True)
class Read:
    """Tensors of one module that another one, above it, reads."""

    path: str
    """The path of the module below, from the reader."""
    names: tuple[str, ...]
    """``weight``, ``bias`` or both."""
    only: bool
    """True if the reader does nothing else with the module: its forward does not run there."""


def reads_of(module: nn.Module) -> list[tuple[Read, nn.Module]]:
    """What ``module`` reads off modules below, with each of these."""
    found, kind = [], type(module)
    for read in _reads(kind) if module._modules else ():  # type: ignore[arg-type]  # classes are hashable
        for path, below in _resolved(module, read.path.split(".")):
            names = tuple(name for name in read.names if below._parameters.get(name) is not None)
            if names:
                found.append((Read(path, names, read.only), below))
    return found


def _resolved(module: nn.Module, parts: list[str], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    if not parts:
        yield path, module
        return
    for name, child in module._modules.items():
        if child is not None and parts[0] in (name, _EACH) and not isinstance(child, Beside):
            yield from _resolved(child, parts[1:], join(path, name))


@cache
def _reads(kind: Any) -> tuple[Read, ...]:
    """What the forward of a class reads, and what it calls on itself."""
    names: dict[str, set[str]] = {}
    used: set[str] = set()
    functions = list(_reached(kind))
    if not any(_TENSORS & _words(function.__code__) for function in functions):
        return ()  # as nearly always; to read the source takes a hundred times as long
    for function in functions:
        for path, name in _chains(function):
            if name:
                names.setdefault(path, set()).add(name)
            else:
                used.add(path)
    return tuple(
        Read(path, tuple(sorted(found)), not any(f"{path}.".startswith(f"{top}.") for top in used))
        for path, found in names.items()
    )


def _reached(kind: type[nn.Module]) -> Iterator[FunctionType]:
    """The functions of a class, and of its bases, that its forward comes to; torch's own left out."""
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        for base in kind.__mro__:
            function = _function(vars(base).get(name))
            if function is None or base.__module__.partition(".")[0] in _OTHERS:
                continue
            yield function
            words = _words(function.__code__)
            waiting += words - seen
            seen |= words
            if "super" not in words:
                break


def _function(attribute: Any) -> FunctionType | None:
    attribute = getattr(attribute, "fget", None) or getattr(attribute, "__func__", attribute)
    function = inspect.unwrap(attribute) if callable(attribute) else None
    return function if isinstance(function, FunctionType) else None


def _words(code: CodeType) -> set[str]:
    """The names of attributes in a function, and in the functions inside it."""
    inside = [_words(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inside)


def _chains(function: FunctionType) -> Iterator[tuple[str, str]]:
    """What a method does with what is below its module: (path, name of a tensor that it reads), or (path, "")."""
    try:
        (tree,) = ast.parse(dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, ValueError):  # written in a console, for one
        return
    if not isinstance(tree, ast.FunctionDef) or not (arguments := [*tree.args.posonlyargs, *tree.args.args]):
        return
    me, inner, asked = arguments[0].arg, set[int](), set[int]()
    for node in ast.walk(tree):  # outer parts of an expression come before inner ones
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
            asked.update(map(id, node.args))
        elif isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
            asked.add(id(node.left))
        if not isinstance(node, (ast.Attribute, ast.Subscript)) or id(node) in inner:
            continue
        parts, inside = _parts(node)
        inner.update(map(id, inside))
        if not parts or parts[0] != me or isinstance(node.ctx, ast.Store) or id(node) in asked:
            continue
        at = next((i for i, part in enumerate(parts) if i > 1 and part in _TENSORS), None)
        if at is None:
            yield ".".join(parts[1:]), ""
        elif not (len(parts) > at + 1 and parts[at + 1] in _QUESTIONS):
            yield ".".join(parts[1:at]), parts[at]


def _parts(node: ast.expr) -> tuple[list[str], list[ast.expr]]:
    """``self.layers[i].weight`` as self, layers, *, weight; and the parts of the expression. Empty for others."""
    parts: list[str] = []
    inside: list[ast.expr] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        parts.append(node.attr if isinstance(node, ast.Attribute) else _EACH)
        node = node.value
        inside.append(node)
    return ([*reversed(parts)] if not isinstance(node, ast.Name) else [node.id, *reversed(parts)]), inside
