"""Folding an adapter into the base weights, for good or for a while."""

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, CallAdapter, InputAdapter, OutputAdapter, WeightAdapter
from lightning_peft.errors import NotMergeableError
from lightning_peft.injection.inject import remove
from lightning_peft.injection.registry import Registry, find_adapter
from lightning_peft.injection.slots import AdapterSlots, adapter_name
from lightning_peft.merging.dequantize import make_plain
from lightning_peft.network.pretrained import pretrained_models
from lightning_peft.network.quantized.weights import is_quantized, plain_dtype, quantized
from lightning_peft.network.walk import base_tensors, below, join, leaf, parent, within


def merge(model: nn.Module, name: str = "default", *, untie: bool = False, dequantize: bool = False) -> None:
    """Fold the adapter ``name`` into the base weights and take it out; the model computes the same without it.

    The new weights are computed in fp32 (fp64 for an fp64 base) and rounded once to the base's dtype. Nothing is
    written unless everything can be.

    Args:
        model: the network.
        name: the adapter.
        untie: whether a layer whose weight is tied to another one's gets a weight of its own. The config of a
            transformers model then says so, so that it loads as it was saved.
        dequantize: whether every quantized layer of ``model``, adapted or not, becomes a plain one of torch's in the
            dtype of the rest of the model, which is then as large as it was before it was quantized.

    Raises:
        AdapterNameError: there is no such adapter.
        NotMergeableError: a method has no weight form, a weight is shared with another layer, or quantized without
            ``dequantize``, or a merged value is not finite.
    """
    prefix, owner, registry = find_adapter(model, name)
    folded = _folded(model, name, untie, dequantize)
    made = make_plain(model) if dequantize else {}
    folded = folded.in_place_of({id(packed): own for packed, own in made.values()})
    for tensor, value in folded.values:
        _write(tensor, value)
    # Once no adapter is left, they train as the plain weights that they are.
    registry.trained_before |= {below(key, prefix) for key in made if within(key, [prefix])}
    _untie(model, folded)
    remove(owner, name)


@contextmanager
def merged(model: nn.Module, name: str = "default", *, untie: bool = False) -> Iterator[None]:
    """Within the ``with`` block the adapter ``name`` is folded into the base weights; then they are restored exactly.

    Raises:
        NotMergeableError: as :func:`merge`.
    """
    _, _, registry = find_adapter(model, name)
    folded = _folded(model, name, untie)
    # Copies of all that changes: the base has to come back bit for bit.
    originals = [(tensor, tensor.detach().clone()) for tensor, _ in folded.values]
    active = registry.active
    configs: list[Any] = []
    try:
        for tensor, value in folded.values:
            _write(tensor, value)
        configs = _untie(model, folded)
        registry.activate(tuple(other for other in active if other != name))
        yield
    finally:
        for place, (tensor, _) in folded.untied.items():
            _place(model, place, tensor)
        for config in configs:
            config.tie_word_embeddings = True
        for tensor, value in originals:
            _write(tensor, value)
        registry.activate(active)


@dataclass(frozen=True)
class _Folded:
    """What merging changes."""

    values: list[tuple[Tensor, Tensor]]
    """Every base tensor that changes, with its new value."""
    untied: dict[str, tuple[Tensor, Tensor]]
    """Every name that gets a tensor of its own: the one that it has now, and the new value."""

    def in_place_of(self, plain: Mapping[int, Tensor]) -> "_Folded":
        """The same with the tensors ``plain`` in place of those with these ids."""
        values = [(plain.get(id(tensor), tensor), value) for tensor, value in self.values]
        return _Folded(values, {name: (plain.get(id(t), t), value) for name, (t, value) in self.untied.items()})


@torch.no_grad()
def _folded(model: nn.Module, name: str, untie: bool, dequantize: bool = False) -> _Folded:
    """What changes where. Nothing is written."""
    prefix, owner, registry = find_adapter(model, name)
    registry.check_settled()
    places, plain = _places(model), plain_dtype(model) if dequantize else None
    tensors: dict[int, Tensor] = {}
    written: dict[int, dict[str, tuple[str, Tensor]]] = {}  # of each tensor: where it changes; by which host; to what
    # Host by host: the adapters of one host change each other's weights, those of two hosts only a tied one.
    for path, adapters in _by_host(registry, name).items():
        host = owner.get_submodule(path)
        before = {key: tensor for key, tensor in base_tensors(host)}
        values = _Widened(before, host, dequantize)
        changed: dict[str, Tensor] = {}
        try:
            for adapter in _in_order(adapters):
                made = adapter.merge(values)
                _check_order(registry.slots[path], name, adapter, made.keys())
                changed.update(made)
                values.update(changed)
        except NotMergeableError as error:
            method = type(registry.attachments[name].method).__name__
            raise NotMergeableError(f"{method} on '{path}' cannot be merged: {error}") from error
        for key, value in changed.items():
            tensor, where = before[key], join(prefix, path, key)
            dtype = (plain or value.dtype) if is_quantized(tensor) else tensor.dtype
            if isinstance(host, nn.Embedding) and host.max_norm is not None:
                raise NotMergeableError(
                    f"'{path}' renormalises the rows it looks up (max_norm), so it would rescale merged rows: keep the "
                    "adapter unmerged, or leave that layer out (exclude_modules)."
                )
            if not torch.isfinite(value.to(dtype)).all():
                raise NotMergeableError(
                    f"Merging {name!r} into '{where}' gives values that are not finite in {dtype}. "
                    "Check the adapter's weights, or merge into a copy of the base in a wider dtype."
                )
            tensors[id(tensor)] = tensor
            written.setdefault(id(tensor), {})[where] = path, value
    # All values are known now, so a tie can be judged by what each of its places would get.
    folded = _Folded([], {})
    for tied, changes in written.items():
        where, (path, first) = next(iter(changes.items()))
        # A tie is no harm where it is one for the adapter as well.
        alike = [place for place, (_, value) in changes.items() if value is first or torch.equal(value, first)]
        if not (others := [place for place in places[tied] if place not in alike]):
            folded.values.append((tensors[tied], first))
        elif untie:
            folded.untied.update({place: (tensors[tied], value) for place, (_, value) in changes.items()})
        else:
            raise NotMergeableError(
                f"'{where}' is tied to '{others[0]}': merging {name!r} would change both. Leave '{path}' out "
                "(exclude_modules), keep the adapter unmerged, or give that layer a weight of its own (untie=True)."
            )
    return folded


@torch.no_grad()
def _untie(model: nn.Module, folded: _Folded) -> list[Any]:
    """Give the layers of ``folded.untied`` tensors of their own; the configs that now say so."""
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for place, (tensor, value) in folded.untied.items():
        # Those that the adapter changes alike stay tied to each other.
        own = next((new for old, merged, new in made if old is tensor and torch.equal(merged, value)), None)
        if own is None:
            own = value.to(tensor.dtype, copy=True)
            own = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
            made.append((tensor, value, own))
        _place(model, place, own)
    configs = []
    for _, pretrained in pretrained_models(model) if made else ():
        words, output = pretrained.get_input_embeddings(), pretrained.get_output_embeddings()
        tied = getattr(pretrained.config, "tie_word_embeddings", False) and output is not None
        if tied and getattr(words, "weight", None) is not output.weight:
            pretrained.config.tie_word_embeddings = False
            configs.append(pretrained.config)
    return configs


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    setattr(model.get_submodule(parent(name)), leaf(name), tensor)


class _Widened(dict[str, Tensor]):
    """A host's tensors, each converted to at least fp32 when it is first read."""

    def __init__(self, tensors: Mapping[str, Tensor], host: nn.Module, dequantize: bool) -> None:
        super().__init__()
        self._tensors, self._host, self._dequantize = tensors, host, dequantize

    def __missing__(self, key: str) -> Tensor:
        tensor = self._tensors[key]
        if is_quantized(tensor) and (weight := quantized(self._host, key)):
            if not self._dequantize:
                raise NotMergeableError(
                    f"'{key}' is quantized ({weight.scheme}): load the adapter on the unquantized base and merge "
                    "there, or let merge(dequantize=True) make every quantized layer a plain one."
                )
            tensor = weight.dequantize()
        # A scheme that is not known here: integers are no weights that anything could be added to.
        if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
            raise NotMergeableError(
                f"'{key}' is quantized ({tensor.dtype}): load the adapter on the unquantized base and merge there."
            )
        self[key] = tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        return self[key]


def _check_order(slots: AdapterSlots, name: str, adapter: Adapter, changed: Set[str]) -> None:
    """Refuse to merge what would then act before another adapter that it acts after, or be replaced by it.

    Args:
        slots: the adapters of the host.
        name: the merged adapter's.
        adapter: one of its parts on the host.
        changed: names of the parameters that it changes.
    """
    acting = [*slots.active, name]
    for slot, other in slots.named_children():
        if (owner := adapter_name(slot)) not in slots.active or owner == name or not isinstance(other, Adapter):
            continue
        if _depends(adapter, other, changed, first=acting.index(owner) < acting.index(name)):
            raise NotMergeableError(
                f"the adapter {owner!r} acts there too, and the order of the two would change. Merge {owner!r} first, "
                f"or activate(model, {name!r})."
            )


def _depends(adapter: Adapter, other: Adapter, changed: Set[str], first: bool) -> bool:
    """True if folding ``adapter`` into the weights changes what it makes together with ``other`` (which acts first)."""
    if other.uses_base_weight:
        return True
    if adapter.additive and other.additive:
        return False
    if isinstance(adapter, WeightAdapter) and isinstance(other, WeightAdapter):
        return first and not set(adapter.names).isdisjoint(other.names)
    if isinstance(other, CallAdapter):  # with the host's weights, and what reads and makes them
        return isinstance(adapter, (InputAdapter, OutputAdapter))
    if isinstance(other, WeightAdapter):  # what it makes of the merged weight, or puts in its place
        return adapter.uses_base_weight or not changed.isdisjoint(other.names)
    if isinstance(adapter, InputAdapter):  # an output adapter reads what the input adapters have made
        return isinstance(other, OutputAdapter) or (isinstance(other, InputAdapter) and not first)
    return first and isinstance(adapter, OutputAdapter) and isinstance(other, OutputAdapter)


def _in_order(adapters: list[Adapter]) -> list[Adapter]:
    """The order in which to fold: the weights' own, what comes behind the host, then, backwards, what is before it."""
    weights, calls, outputs, inputs = (
        [a for a in adapters if isinstance(a, kind)]
        for kind in (WeightAdapter, CallAdapter, OutputAdapter, InputAdapter)
    )
    return [*weights, *calls, *outputs, *reversed(inputs)]  # others act through these


def _by_host(registry: Registry, name: str) -> dict[str, list[Adapter]]:
    hosts: dict[str, list[Adapter]] = {}
    for path, adapter in registry.adapters(name):
        hosts.setdefault(path, []).append(adapter)
    return hosts


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Every name under which each base tensor is held."""
    places: dict[int, list[str]] = {}
    for name, tensor in base_tensors(model):
        places.setdefault(id(tensor), []).append(name)
    return places


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)
