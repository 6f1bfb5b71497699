"""Folding an adapter into the base weights, for good or for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, InputAdapter, OutputAdapter, WeightAdapter
from lightning_peft.core.injection import remove
from lightning_peft.core.registry import Registry, find_adapter
from lightning_peft.core.slots import AdapterSlots, adapter_name, base_modules
from lightning_peft.errors import NotMergeableError


def merge(model: nn.Module, name: str = "default") -> None:
    """Fold the adapter ``name`` into the base weights and take it out; the model computes the same without it.

    The new weights are computed in fp32 (fp64 for an fp64 base) and rounded once to the base's dtype. Nothing is
    written unless everything can be.

    Raises:
        AdapterNameError: there is no such adapter.
        NotMergeableError: a method has no weight form, a weight is shared with another layer or quantised, or a merged
            value is not finite.
    """
    _, owner, _ = find_adapter(model, name)
    for tensor, value in _folded(model, name):
        _write(tensor, value)
    remove(owner, name)


@contextmanager
def merged(model: nn.Module, name: str = "default") -> Iterator[None]:
    """Within the ``with`` block the adapter ``name`` is folded into the base weights; then they are restored exactly.

    Raises:
        NotMergeableError: as :func:`merge`.
    """
    _, _, registry = find_adapter(model, name)
    folded = _folded(model, name)
    originals = [(tensor, tensor.detach().clone()) for tensor, _ in folded]
    active = registry.active
    try:
        for tensor, value in folded:
            _write(tensor, value)
        registry.activate(tuple(other for other in active if other != name))
        yield
    finally:
        for tensor, value in originals:
            _write(tensor, value)
        registry.activate(active)


@torch.no_grad()
def _folded(model: nn.Module, name: str) -> list[tuple[Tensor, Tensor]]:
    """Every base tensor that changes, with its new value. Nothing is written."""
    prefix, owner, registry = find_adapter(model, name)
    registry.check_settled()
    places = _places(model)
    folded: dict[int, tuple[Tensor, Tensor]] = {}
    written: dict[int, dict[str, tuple[str, bool]]] = {}  # of each tensor: where it changes; by which host; all alike?
    for path, adapters in _by_host(registry, name).items():
        host = owner.get_submodule(path)
        registry.slots[path].restore(host)
        before = {key: tensor for key, tensor in base_tensors(host)}
        values = _Widened(before)
        changed: dict[str, Tensor] = {}
        try:
            for adapter in _in_order(adapters):
                _check_order(registry.slots[path], name, adapter)
                changed.update(adapter.merge(values))
                values.update(changed)
        except NotMergeableError as error:
            method = type(registry.attachments[name].method).__name__
            raise NotMergeableError(f"{method} on '{path}' cannot be merged: {error}") from error
        for key, value in changed.items():
            tensor, where = before[key], ".".join(part for part in (prefix, path, key) if part)
            if isinstance(host, nn.Embedding) and host.max_norm is not None:
                raise NotMergeableError(
                    f"'{path}' renormalises the rows it looks up (max_norm), so it would rescale merged rows: keep the "
                    "adapter unmerged, or leave that layer out (exclude_modules)."
                )
            if not torch.isfinite(value.to(tensor.dtype)).all():
                raise NotMergeableError(
                    f"Merging {name!r} into '{where}' gives values that are not finite in {tensor.dtype}. "
                    "Check the adapter's weights, or merge into a copy of the base in a wider dtype."
                )
            _, first = folded.setdefault(id(tensor), (tensor, value))
            written.setdefault(id(tensor), {})[where] = path, first is value or torch.equal(first, value)
    for tied, changes in written.items():
        # A tie is no harm where it is one for the adapter as well.
        if other := next((place for place in places[tied] if not changes.get(place, ("", False))[1]), None):
            where, (path, _) = next(iter(changes.items()))
            raise NotMergeableError(
                f"'{where}' is tied to '{other}': merging {name!r} would change both. Leave '{path}' out "
                f"(exclude_modules), keep the adapter unmerged, or give that layer a copy of the parameter first."
            )
    return list(folded.values())


class _Widened(dict[str, Tensor]):
    """A host's tensors, each converted to at least fp32 when it is first read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def __missing__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
            raise NotMergeableError(
                f"'{key}' is quantised ({tensor.dtype}): load the adapter on the unquantised base and merge there."
            )
        self[key] = tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        return self[key]


def _check_order(slots: AdapterSlots, name: str, adapter: Adapter) -> None:
    """Refuse to merge what would then act before another adapter that it acts after, or the other way round."""
    acting = [*slots.active, name]
    for slot, other in slots.named_children():
        if (owner := adapter_name(slot)) not in slots.active or owner == name or not isinstance(other, Adapter):
            continue
        if _depends(adapter, other, first=acting.index(owner) < acting.index(name)):
            raise NotMergeableError(
                f"the adapter {owner!r} acts there too, and the order of the two would change. Merge {owner!r} first, "
                f"or activate(model, {name!r})."
            )


def _depends(adapter: Adapter, other: Adapter, first: bool) -> bool:
    """Whether folding ``adapter`` into the weights changes what it makes together with ``other`` (which acts first)."""
    if adapter.additive and other.additive:
        return False
    if isinstance(adapter, WeightAdapter) and isinstance(other, WeightAdapter):
        return first and not set(adapter.names).isdisjoint(other.names)
    if isinstance(adapter, InputAdapter):  # an output adapter reads what the input adapters have made
        return isinstance(other, OutputAdapter) or (isinstance(other, InputAdapter) and not first)
    return first and isinstance(adapter, OutputAdapter) and isinstance(other, OutputAdapter)


def _in_order(adapters: list[Adapter]) -> list[Adapter]:
    """The order in which to fold: the weights' own, what comes behind the host, then, backwards, what is before it."""
    weights, outputs, inputs = (
        [a for a in adapters if isinstance(a, kind)] for kind in (WeightAdapter, OutputAdapter, InputAdapter)
    )
    rest = [a for a in adapters if not isinstance(a, (WeightAdapter, OutputAdapter, InputAdapter))]
    return [*weights, *outputs, *reversed(inputs), *rest]


def _by_host(registry: Registry, name: str) -> dict[str, list[Adapter]]:
    hosts: dict[str, list[Adapter]] = {}
    for path, adapter in registry.adapters(name):
        hosts.setdefault(path, []).append(adapter)
    return hosts


def base_tensors(host: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of the base at and below ``host``; a module reached twice counts once."""
    for prefix, module in base_modules(host):
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield f"{prefix}.{name}" if prefix else name, tensor


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Every name under which each base tensor is held."""
    places: dict[int, list[str]] = {}
    for name, tensor in base_tensors(model):
        places.setdefault(id(tensor), []).append(name)
    return places


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)
