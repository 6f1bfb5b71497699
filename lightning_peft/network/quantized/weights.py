"""Quantized weights, seen as what they stand for.

Other packages keep a quantized weight as a tensor of another dtype, of another shape even, and what belongs to it in
other places. What a package does is told in its file beside this one, by functions registered with :func:`reads`
that make a :class:`Quantized` of a weight. A new package is one new file there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.network.walk import Beside, leaf, parent


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """One quantized weight of a module, as the plain weight that it stands for."""

    scheme: str
    """What users call it: ``"nf4"``."""
    shape: torch.Size
    dequantize: Callable[[], Tensor]
    """The plain weight, made anew."""
    error: Callable[[], Tensor]
    """How far each entry may lie from where it was before it was quantized; broadcasts to ``shape``."""
    beside: frozenset[str] = frozenset()
    """Names in the module's state dict of what belongs to the weight."""
    attributes: tuple[str, ...] = ()
    """Attributes of the module that only the quantization needs."""


Reader = Callable[[nn.Module, str, Any], Quantized | None]
_Reader = TypeVar("_Reader", bound=Reader)
_READERS: dict[str, Reader] = {}


def reads(tensor_class: str) -> Callable[[_Reader], _Reader]:
    """Register ``reader(module, name, weight)`` for weights of a class, given by its module and name.

    The reader returns None for a weight that is not quantized, or not yet.
    """

    def register(reader: _Reader) -> _Reader:
        _READERS[tensor_class] = reader
        return reader

    return register


def is_quantized(tensor: Tensor) -> bool:
    """True if ``tensor`` is of a class that keeps quantized weights."""
    return _reader(type(tensor)) is not None


def quantized(module: nn.Module, name: str = "weight") -> Quantized | None:
    """The weight ``name`` of ``module``, a path, if it is quantized; else None."""
    module, name = module.get_submodule(parent(name)), leaf(name)
    weight = module._parameters.get(name)
    reader = None if weight is None else _reader(type(weight))
    return reader(module, name, weight) if reader else None


def plain_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """The weight ``name`` of ``module``, a path, as numbers: dequantized if it is quantized, else itself."""
    found = quantized(module, name)
    return found.dequantize() if found else module.get_parameter(name)


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Quantized]]:
    """Every quantized weight of ``model``: path of its module, the module, its name, and what it is.

    A module that is reached twice comes twice, as in ``model.state_dict()``.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        for name, weight in module._parameters.items():
            # Nearly all are plain parameters, and loading waits for this.
            if type(weight) is not nn.Parameter and weight is not None and (found := quantized(module, name)):
                yield path, module, name, found


def perhaps_rounded(bias: Tensor) -> Quantized:
    """What lies beside a quantized weight, as one: layers cast it, where it lies, to the dtype they are called with."""
    values = bias.detach()
    return Quantized(
        scheme=str(bias.dtype).removeprefix("torch."),
        shape=bias.shape,
        dequantize=lambda: values,
        error=lambda: values.abs() * torch.finfo(torch.bfloat16).eps,
    )


def packed_sizes(model: nn.Module) -> dict[int, int]:
    """How many numbers each quantized weight stands for, by the ``id`` of the tensor that holds them."""
    found = quantized_weights(model)
    return {id(module._parameters[name]): weight.shape.numel() for _, module, name, weight in found}


def plain_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that most of the base's numbers have, the quantized ones left out; None if all are quantized."""
    counts: dict[torch.dtype, int] = {}
    pending = [model]
    while pending:
        module = pending.pop()
        if isinstance(module, Beside):
            continue
        pending += module.children()
        own = [p for p in module._parameters.values() if p is not None]
        if not any(is_quantized(p) for p in own):  # a quantized layer casts its bias to whatever it is called with
            for p in own:
                if p.is_floating_point():
                    counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return max(counts, key=counts.__getitem__) if counts else None


def _reader(kind: type) -> Reader | None:
    if kind is nn.Parameter or kind is Tensor:
        return None
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((_READERS[name] for name in names if name in _READERS), None)
