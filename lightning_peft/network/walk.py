"""Walking through a network: its modules by the paths that a user knows, without adapters and what torch wraps around.

A path is what ``named_modules`` gives, and empty for the model itself.
"""

import re
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor, nn

CHILD = "peft"  # the name under which a host carries its adapters

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})  # torch.compile, activation checkpointing


class Beside(nn.Module):
    """A child that is no part of the base: it and all below is left out of every walk."""


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without the adapters and what torch has wrapped around modules, by plain names.

    ``model.get_submodule`` knows these names, too: a wrapper passes on what it is asked for.
    """
    for path, module in modules_outside(model):
        if not is_wrapper(module):
            yield plain_name(path), module


def modules_outside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without the adapters, and many times faster: switching adapters waits for it."""
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen or isinstance(module, Beside):
            continue
        seen.add(id(module))
        yield path, module
        below = [(f"{path}.{name}" if path else name, m) for name, m in module._modules.items() if m is not None]
        pending += reversed(below)


def base_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of ``module`` that have parameters, by name, without adapters."""
    children = module.named_children()
    return [(name, child) for name, child in children if not isinstance(child, Beside) and has_parameters(child)]


def base_tensors(host: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of the base at and below ``host``; a module reached twice counts once."""
    for path, module in base_modules(host):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield join(path, name), tensor


def has_parameters(module: nn.Module) -> bool:
    """True if there is a parameter in ``module`` or below."""
    return any(True for _ in module.parameters())


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path``, None if there is none any more: as ``get_submodule``, and several times faster."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        below = None if module is None else module._modules.get(name)
        module = getattr(module, name, None) if below is None else below  # a wrapper passes on what it is asked for
    return module


def is_wrapper(module: nn.Module) -> bool:
    """True if torch has put ``module`` around another one."""
    return not _WRAPPERS.isdisjoint(module._modules)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what torch has put around it."""
    while is_wrapper(module):
        module = next(child for name, child in module._modules.items() if name in _WRAPPERS and child is not None)
    return module


def plain_name(name: str) -> str:
    """``"net._orig_mod.0.weight"`` without the parts that ``torch.compile`` and its like put in: ``"net.0.weight"``.

    Files hold plain names, so that what was trained compiled loads uncompiled, and the other way round.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def starred(path: str) -> str:
    """``path`` with a star for each number of a layer: alike layers have one."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def join(*parts: str) -> str:
    """One path of several; empty ones add nothing."""
    return ".".join(part for part in parts if part)


def parent(path: str) -> str:
    """The path of the module that holds the one at ``path``, or the tensor of that name."""
    return path.rpartition(".")[0]


def leaf(path: str) -> str:
    """The last part of a path."""
    return path.rpartition(".")[2]


def within(path: str, tops: Iterable[str]) -> bool:
    """True if ``path`` is one of ``tops``, or of something below one."""
    return any(not top or f"{path}.".startswith(f"{top}.") for top in tops)


def outermost(paths: Collection[str]) -> list[str]:
    """The ``paths`` that are not below another one of them."""
    return [path for path in paths if not any(path != other and within(path, [other]) for other in paths)]


def below(path: str, top: str) -> str:
    """``path``, which is :func:`within` ``top``, as seen from there."""
    return path.removeprefix(top).removeprefix(".")
