"""Quantised weights, seen as what they stand for.

Other packages keep a quantised weight as a tensor of another dtype, of another shape even, and what belongs to it in
other places. What a package does is told in its file beside this one, by functions registered with :func:`reads`
that make a :class:`Quantised` of a weight. A new package is one new file there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.network.walk import Beside, leaf, modules_outside, parent


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """One quantised weight of a module, as the plain weight that it stands for."""

    scheme: str
    """What users call it: ``"nf4"``."""
    shape: torch.Size
    dequantise: Callable[[], Tensor]
    """The plain weight, made anew."""
    error: Callable[[], Tensor]
    """How far each entry may lie from where it was before it was quantised; broadcasts to ``shape``."""
    beside: frozenset[str] = frozenset()
    """Names in the module's state dict of what belongs to the weight."""
    attributes: tuple[str, ...] = ()
    """Attributes of the module that only the quantisation needs."""


Reader = Callable[[nn.Module, str, Any], Quantised | None]
_Reader = TypeVar("_Reader", bound=Reader)
_READERS: dict[str, Reader] = {}


def reads(tensor_class: str) -> Callable[[_Reader], _Reader]:
    """Register ``reader(module, name, weight)`` for weights of a class, given by its module and name.

    The reader returns None for a weight that is not quantised, or not yet.
    """

    def register(reader: _Reader) -> _Reader:
        _READERS[tensor_class] = reader
        return reader

    return register


def is_quantised(tensor: Tensor) -> bool:
    """Whether ``tensor`` is of a class that keeps quantised weights."""
    return _reader(type(tensor)) is not None


def quantised(module: nn.Module, name: str = "weight") -> Quantised | None:
    """The weight ``name`` of ``module``, a path, if it is quantised; else None."""
    module, name = module.get_submodule(parent(name)), leaf(name)
    weight = module._parameters.get(name)
    reader = None if weight is None else _reader(type(weight))
    return reader(module, name, weight) if reader else None


def plain_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """The weight ``name`` of ``module``, a path, as numbers: dequantised if it is quantised, else itself."""
    found = quantised(module, name)
    return found.dequantise() if found else module.get_parameter(name)


def quantised_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Quantised]]:
    """Every quantised weight of ``model``: path of its module, the module, its name, and what it is.

    A module that is reached twice comes twice, as in ``model.state_dict()``.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        for name, weight in module._parameters.items():
            # Nearly all are plain parameters, and loading waits for this.
            if type(weight) is not nn.Parameter and weight is not None and (found := quantised(module, name)):
                yield path, module, name, found


def perhaps_rounded(bias: Tensor) -> Quantised:
    """What lies beside a quantised weight, as one: layers cast it, where it lies, to the dtype they are called with."""
    values = bias.detach()
    return Quantised(
        scheme=str(bias.dtype).removeprefix("torch."),
        shape=bias.shape,
        dequantise=lambda: values,
        error=lambda: values.abs() * torch.finfo(torch.bfloat16).eps,
    )


def packed_sizes(model: nn.Module) -> dict[int, int]:
    """How many numbers each quantised weight stands for, by the ``id`` of the tensor that holds them."""
    return {
        id(weight): found.shape.numel()
        for _, module in modules_outside(model)
        for name, weight in module._parameters.items()
        if type(weight) is not nn.Parameter and weight is not None and (found := quantised(module, name))
    }


def plain_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that most of the base's numbers have, the quantised ones left out; None if all are quantised."""
    counts: dict[torch.dtype, int] = {}
    pending = [model]
    while pending:
        module = pending.pop()
        if isinstance(module, Beside):
            continue
        pending += module.children()
        own = [p for p in module._parameters.values() if p is not None]
        if not any(is_quantised(p) for p in own):  # a quantised layer casts its bias to whatever it is called with
            for p in own:
                if p.is_floating_point():
                    counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return max(counts, key=counts.__getitem__) if counts else None


def _reader(kind: type) -> Reader | None:
    if kind is nn.Parameter or kind is Tensor:
        return None
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((_READERS[name] for name in names if name in _READERS), None)
