"""Which parameters of a base train, for the methods that tune the base's own: by layer, by kind and by name."""

from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_peft.core.entries import TunedEntries, entries
from lightning_peft.core.heads import task_heads
from lightning_peft.core.hosts import find_hosts
from lightning_peft.core.method import Placement
from lightning_peft.core.parameters import COMPONENTS, BaseParameter, count, find_parameters, outside
from lightning_peft.core.roles import ROLES, find_roles
from lightning_peft.core.saved import Copies, TunedParameters, check_trainable, trainable_copy
from lightning_peft.core.targeted import TargetedMethod
from lightning_peft.core.targets import each_pattern, match_names, matches_end, narrow
from lightning_peft.core.walk import within
from lightning_peft.errors import NotApplicableError, TargetError, did_you_mean


def select_parameters(
    model: nn.Module,
    saved: Sequence[str],
    method: TargetedMethod,
    kinds: Collection[str] | None = None,
    names: Sequence[str] | None = None,
) -> list[BaseParameter]:
    """Choose parameters by what the fields of ``method`` say, and by kind and name.

    A parameter that is tied to a chosen one is chosen as well: it is the same.

    Args:
        model: the network.
        saved: paths of modules that are trained whole; nothing below them is chosen.
        method: its ``target_modules`` (None: all but the task head), ``exclude_modules`` and ``layers``. Patterns are
            names or suffixes (all below is chosen too), roles, "norm" and "embedding", and regular expressions.
        kinds: which of :data:`~lightning_peft.core.parameters.KINDS`; None for all, those without a kind included.
        names: suffixes or regular expressions for the ends of the parameters' names; None for all.

    Raises:
        NotApplicableError: the model has no parameter of these kinds, or a named layer has none, or one is quantised.
        TargetError: a pattern or an index matches nothing, or nothing is left.
    """
    scope = _Scope(model, saved, method)
    candidates = [p for p in scope.free if kinds is None or not p.kinds.isdisjoint(kinds)]
    if not candidates:
        elsewhere = any(kinds is None or not p.kinds.isdisjoint(kinds) for p in scope.every)
        raise NotApplicableError(
            f"{type(method).__name__}: {type(model).__name__} has no {_either(kinds)} to train"
            f"{' but those that modules_to_save trains' if elsewhere else ''}. Choose another method, such as LoRA."
        )
    if method.target_modules is None:
        heads = task_heads(model)
        chosen = {p.layer for p in candidates if not within(p.layer, heads)}
    else:
        chosen = set()
        for pattern in each_pattern(method.target_modules):
            matched = scope.match(pattern)
            if not any(p.layer in matched for p in candidates):
                raise NotApplicableError(
                    f"{type(method).__name__}: of the layers that target_modules={pattern!r} matches, first "
                    f"'{min(matched)}', none has any {_either(kinds)}. Leave it out; others that have one are "
                    f"'{candidates[0].layer}' and '{candidates[-1].layer}'."
                )
            chosen |= matched
    chosen.intersection_update(scope.allowed, narrow(scope.layers, scope.layers, None, method.layers))
    result = {p for p in _named(candidates, scope.free, names) if p.layer in chosen}
    if not result:
        raise TargetError(
            f"{type(method).__name__}: nothing is left to train in {type(model).__name__}: every "
            f"{_either(kinds)} is ruled out by target_modules={method.target_modules!r}, "
            f"exclude_modules={method.exclude_modules!r}, layers={method.layers!r}"
            f"{'' if names is None else f' or parameters={list(names)!r}'}."
        )
    for p in scope.free:
        if p in result:
            check_trainable(p.tensor, p.full_name)
    tied = {id(p.tensor) for p in result if p.part is None}
    return [p for p in scope.free if p in result or (p in scope and p.part is None and id(p.tensor) in tied)]


def places_of(
    tensor: nn.Parameter, model: nn.Module, saved: Sequence[str], method: TargetedMethod
) -> list[BaseParameter]:
    """Every module that reads ``tensor``, but for those that are trained whole or excluded."""
    scope = _Scope(model, saved, method)
    return [p for p in scope.free if p.tensor is tensor and p in scope]


class _Scope:
    """What of a model may be chosen at all."""

    def __init__(self, model: nn.Module, saved: Sequence[str], method: TargetedMethod) -> None:
        self.every = find_parameters(model)
        self.free = outside(self.every, saved)
        self.layers = list(dict.fromkeys(p.layer for p in self.free))
        self.roles = find_roles([host for host in find_hosts(model) if not within(host.name, saved)])
        self.roles |= {kind: {p.layer for p in self.free if kind in p.kinds} for kind in COMPONENTS}
        # "norm" means every norm, also where one layer has that very name.
        exclude = list(each_pattern(method.exclude_modules))
        words = [pattern for pattern in exclude if pattern in COMPONENTS and self.roles[pattern]]
        names = [pattern for pattern in exclude if pattern not in words]
        self.allowed = set(narrow(self.layers, self.layers, names, None, self.roles))
        self.allowed.difference_update(*(self.roles[word] for word in words))

    def __contains__(self, parameter: BaseParameter) -> bool:
        return parameter.layer in self.allowed

    def match(self, pattern: str) -> set[str]:
        """The layers that a target pattern means."""
        layers, roles = self.layers, self.roles
        if pattern in COMPONENTS and roles[pattern]:
            return roles[pattern]
        below = {name for name in layers if f".{pattern}." in f".{name}."}
        exact = any(f".{name}".endswith(f".{pattern}") for name in layers)
        matched = (below if exact else None) or roles.get(pattern) or below
        matched = matched or match_names(pattern, layers, "target_modules")
        if matched:
            return matched
        if any(f".{pattern}." in f".{p.layer}." for p in self.every):
            raise TargetError(
                f"target_modules: {pattern!r} is trained whole already (modules_to_save). Take it out of one of them."
            )
        if pattern in ("query", "key", "value") and roles["fused"]:
            raise TargetError(
                f"target_modules: {pattern!r} is not a layer of its own here, but a part of '{min(roles['fused'])}'. "
                "Use the role 'attention', or name that layer."
            )
        known = {part for name in layers for part in name.split(".") if not part.isdigit()}
        hint = did_you_mean(pattern, {*known, *ROLES, *COMPONENTS}) or f" Layers here: {', '.join(sorted(known))}."
        raise TargetError(f"target_modules: {pattern!r} matches no layer with parameters.{hint}")


def tune(chosen: Sequence[BaseParameter]) -> list[Placement]:
    """One adapter for each host that reads parameters of ``chosen``; tied ones stay tied.

    Raises:
        NotApplicableError: one of them is quantised, complex, not there yet, or part of a parametrization.
    """
    copies: Copies = {}
    hosts: dict[str, list[BaseParameter]] = {}
    for p in chosen:
        hosts.setdefault(p.path, []).append(p)
    placements: list[Placement] = []
    for path, own in hosts.items():
        if isinstance(own[0].module, ParametrizationList):
            raise NotApplicableError(
                f"'{own[0].full_name}' only goes into a weight that is computed (a parametrization: weight_norm). "
                "Remove the parametrization first, or leave it out: exclude_modules=['parametrizations']."
            )
        whole = [p.name for p in own if p.part is None]
        parts: dict[str, list[BaseParameter]] = {}
        for p in own:
            if p.part is not None:
                parts.setdefault(p.name, []).append(p)
        for name, pieces in parts.items():
            index = torch.cat([torch.arange(*p.part) for p in pieces if p.part]).to(pieces[0].tensor.device)
            if count(pieces) == pieces[0].tensor.numel():
                whole.append(name)
            else:
                values = trainable_copy(entries(pieces[0].tensor, index), name)
                placements.append(Placement(path, TunedEntries(name, values, index), name.replace(".", "_")))
        if whole:
            placements.append(Placement(path, TunedParameters(own[0].module, whole, copies)))
    return placements


def _named(
    candidates: Sequence[BaseParameter], free: Sequence[BaseParameter], patterns: Sequence[str] | None
) -> Sequence[BaseParameter]:
    """Those whose name ends in one of ``patterns``, each of which must match something."""
    if patterns is None:
        return candidates
    for pattern in patterns:
        if not any(matches_end(pattern, p.full_name) for p in free):
            parts = pattern.count(".") + 1
            known = {".".join(p.full_name.split(".")[-parts:]) for p in free}
            raise TargetError(f"parameters: no parameter is called {pattern!r}.{did_you_mean(pattern, known)}")
    return [p for p in candidates if any(matches_end(pattern, p.full_name) for pattern in patterns)]


def _either(kinds: Collection[str] | None) -> str:
    return "parameter" if kinds is None else " or ".join(sorted(kinds))
