"""Which parameters of a base train, for the methods that tune the base's own: by layer, by kind and by name."""

from collections.abc import Collection, Sequence

from torch import nn

from lightning_peft.errors import NotApplicableError, TargetError, did_you_mean
from lightning_peft.network.blocks import ROLES, find_roles
from lightning_peft.network.hosts import find_hosts
from lightning_peft.network.parameters import COMPONENTS, BaseParameter, check_trainable, find_parameters, outside
from lightning_peft.network.pretrained import task_heads
from lightning_peft.network.targets import Patterns, each_pattern, match_names, matches_end, narrow
from lightning_peft.network.walk import within


def select_parameters(
    name: str,
    model: nn.Module,
    targets: Patterns = None,
    exclude: Patterns = None,
    layers: Sequence[int] | None = None,
    fully_trained: Sequence[str] = (),
    kinds: Collection[str] | None = None,
    names: Sequence[str] | None = None,
) -> list[BaseParameter]:
    """Choose parameters by their layers, by kind and by name.

    A parameter that is tied to a chosen one is chosen as well: it is the same.

    Args:
        name: the method's, for messages.
        model: the network.
        targets: layers; None for all but the task head. Patterns are names or suffixes (all below is chosen too),
            roles, "norm" and "embedding", and regular expressions.
        exclude: layers to leave out, by the same patterns.
        layers: indices in the outermost numbered container; negative ones count from its end.
        fully_trained: paths of modules that are fully trained; nothing below them is chosen.
        kinds: which of :data:`~lightning_peft.network.parameters.KINDS`; None for all, those without a kind included.
        names: suffixes or regular expressions for the ends of the parameters' names; None for all.

    Raises:
        NotApplicableError: the model has no parameter of these kinds, or a named layer has none, or one is quantized.
        TargetError: a pattern or an index matches nothing, or nothing is left.
    """
    scope = _Scope(model, fully_trained, exclude)
    candidates = [p for p in scope.free if kinds is None or not p.kinds.isdisjoint(kinds)]
    if not candidates:
        elsewhere = any(kinds is None or not p.kinds.isdisjoint(kinds) for p in scope.every)
        raise NotApplicableError(
            f"{name}: {type(model).__name__} has no {_either(kinds)} to train"
            f"{' but those that modules_to_save trains' if elsewhere else ''}. Choose another method, such as LoRA."
        )
    if targets is None:
        heads = task_heads(model)
        chosen = {p.layer for p in candidates if not within(p.layer, heads)}
    else:
        chosen = set()
        for pattern in each_pattern(targets):
            matched = scope.match(pattern)
            if not any(p.layer in matched for p in candidates):
                raise NotApplicableError(
                    f"{name}: of the layers that target_modules={pattern!r} matches, first "
                    f"'{min(matched)}', none has any {_either(kinds)}. Leave it out; others that have one are "
                    f"'{candidates[0].layer}' and '{candidates[-1].layer}'."
                )
            chosen |= matched
    chosen.intersection_update(scope.allowed, narrow(scope.layers, scope.layers, None, layers))
    result = {p for p in _named(candidates, scope.free, names) if p.layer in chosen}
    if not result:
        raise TargetError(
            f"{name}: nothing is left to train in {type(model).__name__}: every "
            f"{_either(kinds)} is ruled out by target_modules={targets!r}, "
            f"exclude_modules={exclude!r}, layers={layers!r}"
            f"{'' if names is None else f' or parameters={list(names)!r}'}."
        )
    for p in scope.free:
        if p in result:
            check_trainable(p.tensor, p.full_name)
    tied = {id(p.tensor) for p in result if p.part is None}
    return [p for p in scope.free if p in result or (p in scope and p.part is None and id(p.tensor) in tied)]


def readers_of(
    tensor: nn.Parameter, model: nn.Module, exclude: Patterns = None, fully_trained: Sequence[str] = ()
) -> list[BaseParameter]:
    """Every module that reads ``tensor``, but for those that are fully trained or excluded."""
    scope = _Scope(model, fully_trained, exclude)
    return [p for p in scope.free if p.tensor is tensor and p in scope]


class _Scope:
    """What of a model may be chosen at all."""

    def __init__(self, model: nn.Module, fully_trained: Sequence[str], exclude: Patterns) -> None:
        self.every = find_parameters(model)
        self.free = outside(self.every, fully_trained)
        self.layers = list(dict.fromkeys(p.layer for p in self.free))
        self.roles = find_roles([host for host in find_hosts(model) if not within(host.name, fully_trained)])
        self.roles |= {kind: {p.layer for p in self.free if kind in p.kinds} for kind in COMPONENTS}
        # "norm" means every norm, also where one layer has that very name.
        patterns = list(each_pattern(exclude))
        words = [pattern for pattern in patterns if pattern in COMPONENTS and self.roles[pattern]]
        names = [pattern for pattern in patterns if pattern not in words]
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
                f"target_modules: {pattern!r} is fully trained already (modules_to_save). Take it out of one of them."
            )
        if pattern in ("query", "key", "value") and roles["fused"]:
            raise TargetError(
                f"target_modules: {pattern!r} is not a layer of its own here, but a part of '{min(roles['fused'])}'. "
                "Use the role 'attention', or name that layer."
            )
        known = {part for name in layers for part in name.split(".") if not part.isdigit()}
        hint = did_you_mean(pattern, {*known, *ROLES, *COMPONENTS}) or f" Layers here: {', '.join(sorted(known))}."
        raise TargetError(f"target_modules: {pattern!r} matches no layer with parameters.{hint}")


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
