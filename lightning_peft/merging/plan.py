"""What folding an adapter into the base weights changes: computed, and checked, before anything is written."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import dropwhile, takewhile

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from lightning_peft.core.adapter import Adapter, CallAdapter, InputAdapter, OutputAdapter, WeightAdapter, in_merge_order
from lightning_peft.errors import NotMergeableError
from lightning_peft.injection.names import adapter_name
from lightning_peft.injection.registry import Registry, find_adapter
from lightning_peft.injection.slots import AdapterSlots
from lightning_peft.network.quantized.weights import is_quantized, plain_dtype, quantized
from lightning_peft.network.walk import base_tensors, join


@dataclass(frozen=True)
class MergePlan:
    """What merging changes."""

    values: list[tuple[Tensor, Tensor]]
    """Every base tensor that changes, with its new value."""
    untied: dict[str, tuple[Tensor, Tensor]]
    """Every name that gets a tensor of its own: the one that it has now, and the new value."""
    names: dict[int, str]
    """The names of the tensors that change, by their ids."""

    def in_place_of(self, plain: Mapping[int, Tensor]) -> "MergePlan":
        """The same with the tensors ``plain`` in place of those with these ids."""
        values = [(plain.get(id(tensor), tensor), value) for tensor, value in self.values]
        names = {id(plain[key]) if key in plain else key: name for key, name in self.names.items()}
        untied = {name: (plain.get(id(t), t), value) for name, (t, value) in self.untied.items()}
        return MergePlan(values, untied, names)


@torch.no_grad()
def plan_merge(
    model: nn.Module,
    name: str,
    *,
    untie: bool = False,
    dequantize: bool = False,
    ignore_hooks: bool = False,
    wider: torch.dtype | None = None,
) -> MergePlan:
    """What folding the adapter ``name`` into the base changes. Nothing is written.

    Args:
        model: the network.
        name: the adapter.
        untie: whether a layer whose weight is tied gets one of its own.
        dequantize: whether quantized weights become plain ones.
        ignore_hooks: whether hooks of others, between the weights and what the adapter acts on, are known to look only.
        wider: the dtype that the base is about to be cast to; None to keep its own.

    Raises:
        AdapterNameError: there is no such adapter.
        NotApplicableError: a layer was replaced after the adapter was attached to it.
        NotMergeableError: it cannot be folded in.
    """
    prefix, owner, registry = find_adapter(model, name)
    registry.check_settled(folds=True)
    registry.check_hosts(owner)
    registry.watch.check(owner)
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
            for adapter in in_merge_order(adapters):
                made = adapter.merge(values)
                _check_order(registry.slots[path], name, adapter, made.keys())
                if not ignore_hooks:
                    _check_hooks(registry.slots[path], host, adapter)
                changed.update(made)
                values.update(changed)
        except NotMergeableError as error:
            method = type(registry.attachments[name].method).__name__
            raise NotMergeableError(f"{method} on '{path}' cannot be merged: {error}") from error
        for key, value in changed.items():
            tensor, where = before[key], join(prefix, path, key)
            dtype = wider or ((plain or value.dtype) if is_quantized(tensor) else tensor.dtype)
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
    plan = MergePlan([], {}, {})
    for tied, changes in written.items():
        where, (path, first) = next(iter(changes.items()))
        # A tie is no harm where it is one for the adapter as well.
        alike = [place for place, (_, value) in changes.items() if value is first or torch.equal(value, first)]
        if not (others := [place for place in places[tied] if place not in alike]):
            plan.values.append((tensors[tied], first))
            plan.names[id(tensors[tied])] = where
        elif untie:
            plan.untied.update({place: (tensors[tied], value) for place, (_, value) in changes.items()})
        else:
            raise NotMergeableError(
                f"'{where}' is tied to '{others[0]}': merging {name!r} would change both. Leave '{path}' out "
                "(exclude_modules), keep the adapter unmerged, or give that layer a weight of its own (untie=True)."
            )
    return plan


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


def _check_hooks(slots: AdapterSlots, host: nn.Module, adapter: Adapter) -> None:
    """Refuse to merge an adapter where a hook of somebody else's stands between the weights and what it acts on."""
    if isinstance(adapter, OutputAdapter):
        between = [
            *_global_forward_hooks.values(),
            *takewhile(lambda h: h != slots.after, host._forward_hooks.values()),
        ]
    elif isinstance(adapter, InputAdapter):
        between = [*dropwhile(lambda hook: hook != slots.before, host._forward_pre_hooks.values())]
    else:
        return
    # Hooks of this library only look, or are adapters, whose order is checked elsewhere.
    for hook in between:
        owner = getattr(hook, "__self__", hook)
        if not type(owner).__module__.startswith("lightning_peft."):
            raise NotMergeableError(
                f"a hook ({getattr(hook, '__qualname__', repr(hook))}) stands between its weights and the adapter, and "
                "may change what lies between. Remove it first, keep the adapter, or, if it only looks, say so: "
                "ignore_hooks=True."
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
