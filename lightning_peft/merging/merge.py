"""Folding an adapter into the base weights, for good or for a while."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.injection.inject import detach
from lightning_peft.injection.registry import Registry, find_adapter
from lightning_peft.merging.dequantize import make_plain
from lightning_peft.merging.plan import MergePlan, plan_merge
from lightning_peft.merging.report import MergedLayer, MergeReport
from lightning_peft.network.pretrained import pretrained_models
from lightning_peft.network.walk import below, leaf, parent, within


def merge(
    model: nn.Module,
    name: str = "default",
    dtype: torch.dtype | None = None,
    *,
    untie: bool = False,
    dequantize: bool = False,
    ignore_hooks: bool = False,
) -> MergeReport:
    """Fold the adapter ``name`` into the base weights and take it out; the model computes the same without it.

    The new weights are computed in fp32 (fp64 for an fp64 base) and rounded once to the base's dtype. Nothing is
    written unless everything can be. Forwards on other threads meet weights that are half written.

    Args:
        model: the network.
        name: the adapter.
        dtype: what all of ``model`` is cast to first, such as ``torch.float32``: weights of 16 bits lose much of a
            small change. None to keep its own.
        untie: whether a layer whose weight is tied to another one's gets a weight of its own. The config of a
            transformers model then says so, so that it loads as it was saved.
        dequantize: whether every quantized layer of ``model``, adapted or not, becomes a plain one of torch's in the
            dtype of the rest of the model, which is then as large as it was before it was quantized.
        ignore_hooks: whether hooks of others on adapted layers are known to look only, and to change nothing.

    Returns:
        What rounding has taken from the change of each layer; over 10 % there is a warning, too.

    Raises:
        AdapterNameError: there is no such adapter, a route is active, or an adapter is folded in for a while.
        ConfigError: ``dtype`` is no floating-point dtype.
        NotApplicableError: a layer was replaced after the adapter was attached to it.
        NotMergeableError: a method has no weight form, a weight is shared with another layer, or quantized without
            ``dequantize``, a hook stands in between, or a merged value is not finite.
    """
    prefix, owner, registry = find_adapter(model, name)
    registry.check_settled()
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"merge: dtype must be a floating-point dtype such as torch.float32, not {dtype!r}.")
    options: Any = {"untie": untie, "dequantize": dequantize, "ignore_hooks": ignore_hooks}
    folding = registry.scopes.fold(name)  # no other thread enters a block meanwhile
    try:
        plan = plan_merge(model, name, wider=dtype, **options)
        if dtype is not None:  # now that nothing is refused any more; buffers are other tensors then
            model.to(dtype)
            plan = plan_merge(model, name, **options)
        made = make_plain(model) if dequantize else {}
        plan = plan.in_place_of({id(packed): own for packed, own in made.values()})
        layers = [_write_and_compare(plan.names[id(tensor)], tensor, value) for tensor, value in plan.values]
        # Once no adapter is left, they train as the plain weights that they are.
        registry.trained_before |= {below(key, prefix) for key in made if within(key, [prefix])}
        _untie(model, plan)
        detach(owner, registry, name)
    finally:
        registry.scopes.unfold(folding)
    report = MergeReport(tuple(layers))
    if lossy := report.lossy:
        worst = max(lossy, key=lambda layer: layer.mean_loss)
        warnings.warn(
            f"Rounding to {worst.dtype} has taken more than 10 % of the change of {len(lossy)} merged weights, such as "
            f"{worst.mean_loss:.0%} at '{worst.path}'. To keep it all: merge(model, {name!r}, dtype=torch.float32).",
            stacklevel=2,
        )
    return report


@contextmanager
def merged(
    model: nn.Module, name: str = "default", *, untie: bool = False, ignore_hooks: bool = False
) -> Iterator[None]:
    """Within the ``with`` block the adapter ``name`` is folded into the base weights; then they are restored exactly.

    This is a state of the model, for all threads and tasks. While it holds, adapters are neither switched, added, taken
    out, renamed nor saved; further ones can be folded in by the same task. Forwards that run on other threads while the
    block is entered or left meet weights that are half written.

    Raises:
        AdapterNameError: there is no such adapter, a route is active, other threads or tasks have folded one in, or are
            in blocks of their own.
        NotApplicableError: a layer was replaced after the adapter was attached to it.
        NotMergeableError: as :func:`merge`.
    """
    _, _, registry = find_adapter(model, name)
    registry.check_settled(folds=True)
    mine = registry.scopes.fold(name)
    try:
        plan = plan_merge(model, name, untie=untie, ignore_hooks=ignore_hooks)
        # Copies of all that changes: the base has to come back bit for bit.
        originals = [(tensor, tensor.detach().clone()) for tensor, _ in plan.values]
        configs: list[Any] = []
        mine.undo = partial(_restore, model, registry, originals, plan, configs, registry.active)
        for tensor, value in plan.values:
            _write(tensor, value)
        configs += _untie(model, plan)
        registry.activate(tuple(other for other in registry.active if other != name))
        yield
    finally:
        registry.scopes.unfold(mine)


def _restore(
    model: nn.Module,
    registry: Registry,
    originals: list[tuple[Tensor, Tensor]],
    plan: MergePlan,
    configs: list[Any],
    active: tuple[str, ...],
) -> None:
    for place, (tensor, _) in plan.untied.items():
        _place(model, place, tensor)
    for config in configs:
        config.tie_word_embeddings = True
    for tensor, value in originals:
        _write(tensor, value)
    registry.activate(active)


@torch.no_grad()
def _untie(model: nn.Module, plan: MergePlan) -> list[Any]:
    """Give the layers of ``plan.untied`` tensors of their own; the configs that now say so."""
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for place, (tensor, value) in plan.untied.items():
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


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)


@torch.no_grad()
def _write_and_compare(path: str, tensor: Tensor, value: Tensor) -> MergedLayer:
    """Write ``value``, and tell what rounding it has taken from the change."""
    before = tensor.to(value.dtype, copy=True)
    tensor.copy_(value)
    change, lost = (value - before).abs(), (tensor.to(value.dtype) - value).abs()
    largest, mean = (float(lost.max() / change.max()), float(lost.sum() / change.sum())) if change.any() else (0.0, 0.0)
    return MergedLayer(path, tensor.dtype, largest, mean)
