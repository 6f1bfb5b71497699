"""A new adapter out of others on the same model."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import fits
from lightning_peft.core.method import Placement
from lightning_peft.core.recipes import RECIPES, SPARSE, WHOLE, Recipe
from lightning_peft.errors import AdapterNameError, ConfigError, NotApplicableError, did_you_mean
from lightning_peft.injection.inject import Injection, attach, check_name
from lightning_peft.injection.registry import Registry, find_adapter
from lightning_peft.network.hosts import find_hosts
from lightning_peft.network.walk import base_tensors

Slots = dict[tuple[str, str], Adapter]
"""The adapters of one name, by (path of the host, part)."""


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    method: str = "linear",
    name: str = "combined",
    *,
    density: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
) -> None:
    """Make the adapter ``name`` out of others of one method, each with a weight; a negative one takes its task away.

    The others stay as they are; the new one does not act until :func:`~lightning_peft.activate`. LoRA combines in every
    way. IA3 and whatever tunes parameters of the base (BitFit, norms, saved modules) combine by their changes, of which
    "cat" and "svd" take the sum. Other adapters are networks or tokens of their own, which do not add up.

    Args:
        model: the network.
        weights: the adapters, with their weights.
        method: "linear", "cat", "svd", "ties", "dare_linear", "dare_ties" or "magnitude_prune". "cat" and "svd" are
            exact (up to the rank), the others mix LoRA's factors one by one, with the formulas of peft.
        name: the new adapter's.
        density: share of the entries that the sparse methods keep, greater than 0 and at most 1.
        rank: rank of the result of "svd"; None for the largest of the adapters'.
        seed: for the entries that the methods of DARE keep; None takes torch's global generator.

    Raises:
        AdapterNameError: an adapter is not there, or the name is taken.
        ConfigError: no such method, or an argument is out of range or does not belong to it.
        NotApplicableError: the adapters differ in method, hosts or shapes, or their method does not combine.
    """
    recipe = _recipe(weights, method, density, rank, seed)
    found = [find_adapter(model, source) for source in weights]
    _, owner, registry = found[0]
    for source, (_, other, _) in zip(weights, found, strict=True):
        if other is not owner:
            raise AdapterNameError(f"{source!r} was injected on another module than {next(iter(weights))!r}.")
    registry.check_settled()
    check_name(name, registry)
    attachments = [registry.attachments[source] for source in weights]
    sources = [_slots(registry, source) for source in weights]
    _check_alike(registry, list(weights), sources)
    # Copies of the first one's adapters, so that everything that does not mix comes along.
    made = _copies(owner, sources[0])
    for place, adapter in made.items():
        host = owner.get_submodule(place[0])
        try:
            adapter.combine([source[place] for source in sources], recipe, dict(base_tensors(host)))
        except NotApplicableError as error:
            kind = type(attachments[0].method).__name__
            raise NotApplicableError(f"{kind} on '{place[0]}' cannot be combined: {error}") from error
        # An adapter that diverged, or a weight that is far too large: nothing of that is kept.
        if not all(torch.isfinite(p).all() for p in adapter.parameters()):
            raise NotApplicableError(f"Combining the adapters on '{place[0]}' gives values that are not finite.")
    if method in WHOLE and not any(adapter.low_rank() for adapter in made.values()):
        raise NotApplicableError(f"{method!r} is for low-rank factors, and these adapters have none: use 'linear'.")
    names = {(host.path, host.part): host.name for host in find_hosts(owner)}
    by_name = {names[place]: adapter for place, adapter in made.items() if place in names}
    combined = attachments[0].method.combined(by_name)

    # Nothing above has changed the model; nothing below fails.
    placements = tuple(Placement(path, adapter, part) for (path, part), adapter in made.items())
    attach(
        owner, Injection(name, combined, attachments[0].fully_trained, placements, attachments[0].left_out), acts=False
    )
    for adapter in made.values():
        adapter.train_parameters(False)


def _recipe(
    weights: Mapping[str, float], method: str, density: float | None, rank: int | None, seed: int | None
) -> Recipe:
    if method not in RECIPES:
        known = ", ".join(map(repr, RECIPES))
        raise ConfigError(f"combine has no method {method!r}; methods: {known}.{did_you_mean(str(method), RECIPES)}")
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"combine needs adapters and their weights, such as {{'a': 0.7, 'b': 0.3}}, not {weights!r}.")
    for source, weight in weights.items():
        if not fits(weight, float) or not math.isfinite(weight):
            raise ConfigError(f"combine: the weight of {source!r} must be a finite number, not {weight!r}.")
    # A density that a method ignores would be a silent mistake.
    if method in SPARSE:
        if density is None or not fits(density, float) or not 0 < density <= 1:
            raise ConfigError(f"combine({method=}) needs density, greater than 0 and at most 1, not {density!r}.")
    elif density is not None:
        raise ConfigError(f"combine: density is for {', '.join(SPARSE)}; {method!r} keeps every entry.")
    if rank is not None and (method != "svd" or type(rank) is not int or rank < 1):
        raise ConfigError(f"combine: rank is for 'svd', at least 1 and whole; not {rank!r} with {method!r}.")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    weight_values = tuple(float(weight) for weight in weights.values())
    return Recipe(name=method, weights=weight_values, density=density or 1.0, rank=rank, generator=generator)


def _slots(registry: Registry, name: str) -> Slots:
    return {(path, part): adapter for path, part, adapter in registry.parts(name)}


def _check_alike(registry: Registry, names: Sequence[str], sources: Sequence[Slots]) -> None:
    methods = {name: type(registry.attachments[name].method) for name in names}
    # Mixing is entry by entry: the same method, hosts and classes everywhere, whatever the values.
    first = names[0]
    for name, slots in zip(names, sources, strict=True):
        if methods[name] is not methods[first]:
            raise NotApplicableError(
                f"combine: {first!r} is {methods[first].__name__} and {name!r} is {methods[name].__name__}. Only "
                "adapters of one method add up; several can act side by side: activate(model, *names)."
            )
        if different := slots.keys() ^ sources[0].keys():
            path = min(different)[0]
            raise NotApplicableError(
                f"combine: of {first!r} and {name!r}, only {(name if min(different) in slots else first)!r} adapts "
                f"'{path}'. Combine adapters with the same target_modules and modules_to_save."
            )
        for place, adapter in slots.items():
            if type(adapter) is not type(sources[0][place]):
                raise NotApplicableError(
                    f"combine: {first!r} and {name!r} act on '{place[0]}' in different ways: "
                    f"{type(sources[0][place]).__name__} and {type(adapter).__name__}."
                )


def _copies(owner: nn.Module, slots: Slots) -> Slots:
    """Copies of adapters, with what they share among each other, and none of the base."""
    adapters = {id(module) for adapter in slots.values() for module in adapter.modules()}
    memo: dict[int, Any] = {id(module): module for module in owner.modules() if id(module) not in adapters}
    made = {place: copy.deepcopy(adapter, memo) for place, adapter in slots.items()}
    for adapter in made.values():
        adapter.train_parameters()
    return made
