"""What the forward of a layer's class computes with its weight, read off its source.

A forward may do anything, so it is read, and never run: a run would show what it does to one input alone, and could
change the module.
"""

import ast
import inspect
import re
from functools import cache
from textwrap import dedent
from types import FunctionType
from typing import Any

from torch import nn

from lightning_peft.network.quantized.weights import is_quantized

# What transformers' scaled embeddings return.
_SCALES = re.compile(r"return super\(\)\.forward\(x\) \* self\.(?P<name>\w+)(\.to\(self\.weight\.dtype\))?")
# What torch's own linear layer and convolutions compute, in other words; the second one is Falcon's.
_PLAIN = re.compile(
    r"return ((torch\.)?nn\.functional|F)\.linear\(x, self\.weight, self\.bias\)"
    r"|(?P<y>\w+) = x @ self\.weight\.T\nif self\.bias is None:\n    return (?P=y)\nreturn (?P=y) \+ self\.bias"
    r"|return super\(\)\.forward\(x\)"
    r"|return self\._conv_forward\(x, self\.weight, self\.bias\)"
)


def has_known_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if ``module`` computes what torch's ``kind`` does: its output is known from its weight.

    The classes of quantized layers have forwards of their own, which compute the same.
    """
    own = type(module).forward
    weight = module._parameters.get("weight")
    return own is kind.forward or (weight is not None and is_quantized(weight)) or bool(_PLAIN.fullmatch(_body(own)))


def scaling_attribute(forward: Any) -> str | None:
    """The attribute that ``forward`` multiplies what it has looked up with, if that is all that it does."""
    found = _SCALES.fullmatch(_body(forward))
    return found["name"] if found else None


@cache
def _body(forward: Any) -> str:
    """The statements of a forward of one input, which is called x in them; empty where they cannot be read."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return ""
    try:
        (function,) = ast.parse(dedent(inspect.getsource(forward))).body
    except (OSError, SyntaxError, ValueError):  # written in a console, for one
        return ""
    if not isinstance(function, ast.FunctionDef) or function.decorator_list or len(function.args.args) != 2:
        return ""
    x = function.args.args[1].arg
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == x:
            node.id = "x"
    code = [line for line in function.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    return "\n".join(map(ast.unparse, code))  # without the docstring
