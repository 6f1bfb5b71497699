"""What a method's fields choose in a network: hosts, modules of any kind, or parameters."""

from collections.abc import Collection, Iterable, Sequence

from torch import nn

from lightning_peft.errors import NotApplicableError, TargetError, did_you_mean
from lightning_peft.network.blocks import find_roles
from lightning_peft.network.hosts import Host, find_hosts
from lightning_peft.network.parameters import COMPONENTS, BaseParameter, check_trainable, find_parameters, outside
from lightning_peft.network.patterns import Patterns, Vocabulary, each_pattern, ends_with, in_layers, matches_end
from lightning_peft.network.pretrained import outside_base, task_heads
from lightning_peft.network.walk import base_modules, has_parameters, leaf, outermost, within

ALL_LINEAR = "all-linear"


def select_hosts(
    model: nn.Module,
    targets: list[str] | str,
    exclude: Patterns = None,
    layers: Sequence[int] | None = None,
    fully_trained: Sequence[str] = (),
) -> list[Host]:
    """Choose the hosts that a method adapts.

    Args:
        model: the network.
        targets: ``"all-linear"`` (every linear layer outside the task head), a role or a list of name suffixes and
            roles, or one regular expression for the whole name.
        exclude: name parts (``"pooler"`` drops all below any module of that name), roles, or one regular expression.
        layers: indices in the outermost numbered container; negative ones count from its end.
        fully_trained: paths of modules that are fully trained; nothing below them is chosen.

    Raises:
        TargetError: one of the patterns or indices matches nothing, or nothing is left.
    """
    every = list(find_hosts(model))
    hosts = [host for host in every if not within(host.name, fully_trained)]
    kinds = {leaf(host.name): type(host.module).__name__ for host in hosts}
    vocabulary = Vocabulary(
        [host.name for host in hosts],
        {} if targets == ALL_LINEAR and exclude is None else find_roles(hosts),
        aliases={host.name: host.path for host in hosts},
        taken=[host.name for host in every if within(host.name, fully_trained)],
        kinds=kinds,
        model=model,
    )
    # By structure, not by name: the head and the output embedding of a language model stay as they are.
    if targets == ALL_LINEAR:
        head = outside_base(model)
        chosen = {host.name for host in hosts if host.linear and not within(host.name, head)}
    else:
        chosen = vocabulary.find(targets)
    names = set(vocabulary.narrow(chosen, exclude, layers))
    if not names:
        here = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise TargetError(
            f"Nothing to adapt: target_modules={targets!r}, exclude_modules={exclude!r}, layers={layers!r} leave no "
            f"layer of {type(model).__name__}. "
            + (f"Layers here: {here}." if here else "It has no linear, convolution, embedding or attention layer.")
        )
    return [host for host in hosts if host.name in names]


def select_modules(
    model: nn.Module,
    targets: list[str] | str,
    exclude: Patterns = None,
    layers: Sequence[int] | None = None,
    fully_trained: Sequence[str] = (),
) -> list[str]:
    """Choose modules of any kind by name suffix, role or one regular expression; the rest as :func:`select_hosts`.

    Returns:
        Paths of modules whose forward runs: the weights inside an ``nn.MultiheadAttention`` stand for the whole.

    Raises:
        TargetError: one of the patterns or indices matches nothing, or nothing is left.
    """
    hosts = list(find_hosts(model))
    runs = {path: path for path, module in base_modules(model) if has_parameters(module)}
    runs.update({host.name: host.path for host in hosts})
    # A bare index tells a user nothing, so messages leave it out.
    kinds = {leaf(name): "" for name in runs if name and not leaf(name).isdigit()}
    vocabulary = Vocabulary(runs, find_roles(hosts), kinds=kinds, noun="module", model=model)
    left = vocabulary.narrow(vocabulary.find(targets), exclude, layers)
    inside = [runs[name] for name in left if not within(runs[name], fully_trained)]
    if not inside:
        raise TargetError(
            f"Nothing to adapt: target_modules={targets!r}, exclude_modules={exclude!r}, layers={layers!r} and "
            f"modules_to_save leave no module of {type(model).__name__}."
        )
    return list(dict.fromkeys(inside))


def match_modules(model: nn.Module, patterns: Iterable[str], field: str) -> list[str]:
    """Paths of the modules whose name ends in one of ``patterns``; each must match a module that has parameters.

    Raises:
        TargetError: a pattern matches nothing, or only modules without parameters.
    """
    named = [(path, module) for path, module in base_modules(model) if path]
    found: list[str] = []
    for pattern in patterns:
        paths = [path for path, module in named if ends_with(path, pattern) and has_parameters(module)]
        if not paths:
            raise TargetError(
                f"{field}: no module with parameters is called {pattern!r} in {type(model).__name__}."
                f"{did_you_mean(pattern, {leaf(path) for path, _ in named})}"
            )
        found += [path for path in paths if path not in found]
    # A module below another one is trained along with it, and must not be trained twice.
    return outermost(found)


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
        kinds: which of :data:`~lightning_peft.network.parameters.KINDS`; None for all, also without a kind.
        names: suffixes or regular expressions for the ends of the parameters' names; None for all.

    Raises:
        NotApplicableError: the model has no parameter of these kinds, or a named layer has none, or one is quantized.
        TargetError: a pattern or an index matches nothing, or nothing is left.
    """
    free, vocabulary = _layers_of(model, fully_trained)
    candidates = [p for p in free if kinds is None or not p.kinds.isdisjoint(kinds)]
    what = "parameter" if kinds is None else " or ".join(sorted(kinds))
    # Told before any pattern is read: no pattern could help.
    if not candidates:
        elsewhere = any(kinds is None or not p.kinds.isdisjoint(kinds) for p in find_parameters(model))
        raise NotApplicableError(
            f"{name}: {type(model).__name__} has no {what} to train"
            f"{' but those that modules_to_save trains' if elsewhere else ''}. Choose another method, such as LoRA."
        )
    # Apart from the layers: a tied parameter is chosen with its twin in another layer, but never in an excluded one.
    allowed = set(vocabulary.narrow(vocabulary.names, exclude))
    if targets is None:
        heads = task_heads(model)
        chosen = {p.layer for p in candidates if not within(p.layer, heads)}
    else:
        chosen = set()
        for pattern in each_pattern(targets):
            matched = vocabulary.find(pattern)
            if not any(p.layer in matched for p in candidates):
                raise NotApplicableError(
                    f"{name}: of the layers that target_modules={pattern!r} matches, first '{min(matched)}', none has "
                    f"any {what}. Leave it out; others that have one are '{candidates[0].layer}' and "
                    f"'{candidates[-1].layer}'."
                )
            chosen |= matched
    # Indices count among all layers, so that what else is excluded does not renumber them.
    chosen &= allowed if layers is None else allowed & in_layers(layers, vocabulary.names)
    result = {p for p in _called(candidates, free, names) if p.layer in chosen}
    if not result:
        raise TargetError(
            f"{name}: nothing is left to train in {type(model).__name__}: every {what} is ruled out by "
            f"target_modules={targets!r}, exclude_modules={exclude!r}, layers={layers!r}"
            f"{'' if names is None else f' or parameters={list(names)!r}'}."
        )
    # Last, so that quantized layers beside the chosen ones are no error.
    for p in result:
        check_trainable(p.tensor, p.full_name)
    tied = {id(p.tensor) for p in result if p.part is None}
    return [p for p in free if p in result or (p.layer in allowed and p.part is None and id(p.tensor) in tied)]


def readers_of(
    tensor: nn.Parameter, model: nn.Module, exclude: Patterns = None, fully_trained: Sequence[str] = ()
) -> list[BaseParameter]:
    """Every module that reads ``tensor`` and is neither fully trained nor excluded."""
    free, vocabulary = _layers_of(model, fully_trained)
    allowed = set(vocabulary.narrow(vocabulary.names, exclude))
    return [p for p in free if p.tensor is tensor and p.layer in allowed]


def _layers_of(model: nn.Module, fully_trained: Sequence[str]) -> tuple[list[BaseParameter], Vocabulary]:
    """The parameters that are not fully trained, and their layers by the words that patterns may use."""
    every = find_parameters(model)
    free = outside(every, fully_trained)
    names = dict.fromkeys(p.layer for p in free)
    words = find_roles([host for host in find_hosts(model) if not within(host.name, fully_trained)])
    words |= {kind: {p.layer for p in free if kind in p.kinds} for kind in COMPONENTS}
    taken = [p.layer for p in every if p.layer not in names]
    noun = "layer with parameters"
    return free, Vocabulary(names, words, first=COMPONENTS, taken=taken, noun=noun, below=True, model=model)


def _called(
    candidates: Sequence[BaseParameter], free: Sequence[BaseParameter], patterns: Sequence[str] | None
) -> Sequence[BaseParameter]:
    """The candidates whose name ends in one of ``patterns``, each of which must match something."""
    if patterns is None:
        return candidates
    for pattern in patterns:
        if not any(matches_end(pattern, p.full_name) for p in free):
            parts = pattern.count(".") + 1
            known = {".".join(p.full_name.split(".")[-parts:]) for p in free}
            raise TargetError(f"parameters: no parameter is called {pattern!r}.{did_you_mean(pattern, known)}")
    return [p for p in candidates if any(matches_end(pattern, p.full_name) for pattern in patterns)]
