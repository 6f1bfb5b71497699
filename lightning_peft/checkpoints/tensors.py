"""The tensors of a file against the adapters' own: compared first, and copied when all of them fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.components.tuned import TunedParameters
from lightning_peft.core.method import Placement
from lightning_peft.errors import AdapterKeyError, BaseMismatchError, CheckpointError, did_you_mean
from lightning_peft.injection.names import slot_name
from lightning_peft.network.walk import CHILD, join


@dataclass(frozen=True)
class TensorView:
    """One tensor of a file, joined from views of an adapter's parameters."""

    parts: tuple[Tensor, ...]
    dim: int = 0
    """The dimension along which the parts lie side by side."""
    trained: bool = True
    """True if these are parameters, and no buffers."""
    finite: bool = True
    """True if these have to be numbers; buffers of the base, or copied from it, may be masks of infinities."""

    @property
    def shape(self) -> list[int]:
        """The shape in the file."""
        size = list(self.parts[0].shape)
        if len(self.parts) == 1:  # a count has no dimension to join along
            return size
        size[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return size

    def value(self) -> Tensor:
        """The tensor for the file, with memory of its own."""
        if len(self.parts) == 1:
            return self.parts[0].detach().cpu().clone(memory_format=torch.contiguous_format)
        return torch.cat([part.detach() for part in self.parts], self.dim).cpu()

    def fill(self, value: Tensor) -> None:
        """Put ``value``, of :attr:`shape`, into the parameters."""
        one = len(self.parts) == 1
        pieces = (value,) if one else value.split([part.shape[self.dim] for part in self.parts], self.dim)
        for part, piece in zip(self.parts, pieces, strict=True):
            part.detach().copy_(piece)


Views = Mapping[str, TensorView]
"""What a file has to hold: by its keys, views of adapters' tensors."""
OWN_NAME = "default"
"""What an adapter is called in our own keys of a directory, whatever it is called in the model."""


def view_of(tensor: Tensor, copied: bool) -> TensorView:
    """A view of one tensor (any shape) of an adapter; ``copied`` if the adapter copies its buffers from the base."""
    trained = isinstance(tensor, nn.Parameter)
    return TensorView((tensor,), trained=trained, finite=trained or not copied)


def own_views(placements: Sequence[Placement], name: str = OWN_NAME) -> dict[str, TensorView]:
    """The tensors of ``placements`` by our own keys: the keys of a state dict whose adapter is called ``name``."""
    return {
        key: view_of(tensor, copied=isinstance(placement.adapter, TunedParameters))
        for placement in placements
        for key, tensor in placement.adapter.state_dict(prefix=_prefix(placement, name), keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }


def fill_own(placements: Sequence[Placement], tensors: Mapping[str, Tensor], name: str = OWN_NAME) -> None:
    """Put ``tensors``, by our own keys, into adapters that are attached to nothing.

    Raises:
        AdapterKeyError: one is missing, left over, or has another shape or kind; nothing is changed then.
    """
    check_tensors(own_views(placements, name), tensors)
    for placement in placements:
        prefix, state = _prefix(placement, name), placement.adapter.state_dict()
        placement.adapter.load_state_dict({key: tensors[prefix + key] for key in state})


def check_tensors(
    wanted: Views,
    found: Mapping[str, Any],
    *,
    exact: bool = True,
    base: Mapping[str, Tensor] | None = None,
    of: str = "adapter ",
) -> None:
    """Raise unless ``found`` holds the ``wanted`` tensors, and nothing else.

    Args:
        wanted: what has to be there.
        found: the tensors of a file.
        exact: True if parameters must have the very dtype that they have here, as they do where we wrote them.
        base: tensors of the base that may be there too, provided that they are equal; None for none.
        of: what the tensors belong to, for messages.

    Raises:
        AdapterKeyError: a tensor is missing, left over, or has another shape or kind.
        BaseMismatchError: a tensor of the base has other values.
        CheckpointError: a parameter has values that are no numbers.
    """
    if missing := sorted(wanted.keys() - found.keys()):
        raise AdapterKeyError(
            f"The file lacks {len(missing)} of {len(wanted)} {of}tensors, first '{missing[0]}'. It is damaged, or the "
            "adapter was trained with other settings, or on another base."
        )
    extra = sorted(found.keys() - wanted.keys())
    # peft saves an embedding along with the adapter on it, and modules that it expects to be trained.
    own = {key: (base or {}).get(key.replace(".base_layer.", ".")) for key in extra}
    if foreign := [key for key in extra if own[key] is None]:
        raise AdapterKeyError(
            f"The file holds {len(foreign)} tensors that belong to no adapter, first '{foreign[0]}'."
            f"{did_you_mean(foreign[0], wanted)}"
        )
    for key, tensor in own.items():
        if tensor is not None and not _equal(tensor, found[key]):
            raise BaseMismatchError(
                f"The file brings its own values for '{key}' of the base, which has others here (an enlarged "
                "vocabulary, or another base). Put these into the base model first, and train there."
            )
    for key, view in wanted.items():
        _check_tensor(key, found[key], view, exact)


def _check_tensor(key: str, found: Any, view: TensorView, exact: bool) -> None:
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != view.shape:
        raise AdapterKeyError(f"'{key}' is {shape} in the file and must have shape {view.shape}.")
    here, exact = view.parts[0], exact and view.trained  # buffers have the precision of the base that was there
    kind, must = "meta" if found.is_meta else _kind(found, exact), _kind(here, exact)
    if kind != must:
        raise AdapterKeyError(
            f"'{key}' is {kind} in the file and must be {must}: it is damaged, was changed after it was saved, or "
            "belongs to a base of another precision."
        )
    if view.finite and found.is_floating_point() and not found.isfinite().all():
        raise CheckpointError(
            f"'{key}' holds NaN or infinite values: the training that wrote the file had diverged. Use an earlier "
            "checkpoint."
        )


def _kind(tensor: Tensor, exact: bool) -> str:
    """What a tensor is: its dtype ("float" for all of them if not ``exact``), and how it is laid out."""
    dtype = "float" if tensor.is_floating_point() and not exact else str(tensor.dtype).removeprefix("torch.")
    layout = "" if tensor.layout == torch.strided else f" {str(tensor.layout).removeprefix('torch.')}"
    return dtype + layout


def _equal(own: Tensor, other: Tensor) -> bool:
    """True if both are the same numbers but for rounding to the coarser of their dtypes."""
    if own.shape != other.shape or own.is_floating_point() != other.is_floating_point():
        return False
    if not own.is_floating_point():
        return torch.equal(own.cpu(), other)
    coarser = max(torch.finfo(own.dtype).eps, torch.finfo(other.dtype).eps)
    return torch.allclose(own.detach().cpu().double(), other.double(), rtol=2 * coarser, atol=1e-12)


def _prefix(placement: Placement, name: str) -> str:
    return join(placement.path, CHILD, slot_name(name, placement.part)) + "."
