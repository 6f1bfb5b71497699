"""Bounds on what comes out of a file, so that going through it ends and takes no more memory than it should."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_peft.core.fields import fits
from lightning_peft.core.starting import for_a_file
from lightning_peft.errors import CheckpointError, PEFTError

_DEPTH = 64
_CONTAINERS = 200_000
_BITS = 4096  # random generators have states of 128; Python refuses to print more than some 14,000
_UNFOLDED = 2**26  # bytes of a tensor that repeats its own elements
_LEAST = 1024  # what a tensor counts at the least: a file could ask for a billion small ones
_SPARE = 2**24  # elements that a plan may create beside its adapters: positions, or what comes from a seed

_SIZED = frozenset({"expand", "repeat", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"})
"""Torch's functions of a tensor that take a size; the lists of other functions hold dimensions."""


def check_bounds(value: dict[Any, Any]) -> None:
    """Refuse a file's nested values if they are too deep, too many, or too large to be handled.

    A file of a few bytes can hold them: lists inside themselves, one list in many places, one element seen as many.

    Raises:
        CheckpointError: says which.
    """
    # A list of pending containers in place of recursion, which a deep file would exhaust.
    waiting: list[tuple[Any, int, object]] = [(value, 0, "")]
    for _ in range(_CONTAINERS):
        if not waiting:
            return
        found, depth, top = waiting.pop()
        if depth > _DEPTH:
            raise CheckpointError(f"what it holds under {top!r} is nested more than {_DEPTH} deep, so it is damaged.")
        mapping = isinstance(found, dict)
        for key, item in found.items() if mapping else enumerate(found):
            part = top or key
            # A key may be as large as a value.
            for one in (key, item) if mapping else (item,):
                if type(one) is int:
                    if one.bit_length() > _BITS:
                        raise CheckpointError(f"a number under {part!r} has over {_BITS} bits, so it is damaged.")
                elif isinstance(one, (dict, list, tuple, set, frozenset)):
                    waiting.append((one, depth + 1, part))
                elif isinstance(one, Tensor):
                    _check_tensor(one, part)
    raise CheckpointError(f"it unfolds to more than {_CONTAINERS} lists and mappings, so it is damaged.")


@contextmanager
def limit_allocation(model: nn.Module, tensors: Iterable[Any]) -> Iterator[None]:
    """Plan adapters for a file's values in the ``with`` block, and refuse to create larger ones than the file has.

    What a file says of its adapters need not be true of the tensors in it, and a rank of 10**9 would fill any memory
    before the shapes could be compared.

    Args:
        model: the network that adapters are planned for; copies of its parameters are as large as these.
        tensors: the tensors of the file; other values do not count.

    Raises:
        CheckpointError: a tensor, or all together, would be larger than ``tensors``.
    """
    held = sum(max(tensor.numel(), _LEAST) for tensor in tensors if isinstance(tensor, Tensor))
    own = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    largest = max((tensor.numel() for tensor in own if not nn.parameter.is_lazy(tensor)), default=0)
    # A file may hold a seed alone, from which two tensors as large as layers are drawn.
    with for_a_file(), _Allowance(one=max(held, largest) + _SPARE, together=4 * held + 2 * largest + _SPARE):
        yield


@contextmanager
def as_checkpoint_error() -> Iterator[None]:
    """Turn any other error that a file's content causes into one that says so.

    Files can hold anything; checks of their own exist for damage that deserves its own words.

    Raises:
        CheckpointError: in place of any error that is not this library's.
    """
    try:
        yield
    except PEFTError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"The record or the tensors of this file are damaged ({type(error).__name__}: {error}). Use another copy."
        ) from error


class _Allowance(TorchDispatchMode):
    """Looks at sizes before torch allocates: of ``one`` tensor, and of all that are made from nothing ``together``."""

    def __init__(self, one: int, together: int) -> None:
        super().__init__()
        self.one, self.left = one, together

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        fresh = not any(isinstance(arg, Tensor) for arg in args)  # zeros, empty, randn, …
        sized = fresh or func.overloadpacket.__name__ in _SIZED
        if torch.device((kwargs or {}).get("device") or "cpu").type == "meta":
            sized = fresh = False  # no memory at all
        sizes = [math.prod(arg) for arg in args if sized and fits(arg, list[int])]
        if max(sizes, default=0) > self.one or (fresh and sizes and max(sum(sizes), _LEAST) > self.left):
            raise CheckpointError(
                f"The adapters that the file describes need a tensor of {max(sizes)} elements, more than the file "
                "holds, or far more tensors: its record is damaged, or was edited. Use another copy."
            )
        if fresh:
            self.left -= sum(max(size, _LEAST) for size in sizes)
        return func(*args, **(kwargs or {}))


def _check_tensor(tensor: Tensor, top: object) -> None:
    if tensor.layout != torch.strided or tensor.is_meta:
        return
    size = tensor.numel() * tensor.element_size()
    if size > max(_UNFOLDED, tensor.untyped_storage().nbytes()):
        raise CheckpointError(
            f"a tensor under {top!r} of shape {list(tensor.shape)} repeats the few elements that are in the file, so "
            "it is damaged. Save such a tensor with .contiguous()."
        )
