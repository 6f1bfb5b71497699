"""Selection of hosts by name, regular expression, role and layer index. What matches nothing is an error."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lightning_peft.errors import TargetError, did_you_mean
from lightning_peft.network.blocks import ROLES, find_roles
from lightning_peft.network.hosts import Host, find_hosts
from lightning_peft.network.pretrained import outside_base
from lightning_peft.network.walk import base_modules, leaf, within

ALL_LINEAR = "all-linear"

Patterns = list[str] | str | None
T = TypeVar("T")


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
    hosts: list[Host] = []
    whole: list[Host] = []
    for host in find_hosts(model):
        (whole if within(host.name, fully_trained) else hosts).append(host)
    roles = {} if targets == ALL_LINEAR and exclude is None else find_roles(hosts)
    if targets == ALL_LINEAR:
        head = outside_base(model)
        chosen = {host.name for host in hosts if host.linear and not within(host.name, head)}
    else:
        chosen = set().union(*(_match_target(pattern, hosts, roles, whole) for pattern in each_pattern(targets)))
    names = narrow(chosen, [host.name for host in hosts], exclude, layers, roles)
    if not names:
        raise TargetError(
            f"Nothing to adapt: target_modules={targets!r}, exclude_modules={exclude!r}, layers={layers!r} leave no "
            f"layer of {type(model).__name__}.{_known('', hosts)}"
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
    runs = {path: path for path, module in base_modules(model) if any(True for _ in module.parameters())}
    runs.update({host.name: host.path for host in hosts})
    roles = find_roles(hosts)
    chosen: set[str] = set()
    for pattern in each_pattern(targets):
        by_name = {name for name in runs if _ends_with(name, pattern)}
        names = by_name or roles.get(pattern) or match_names(pattern, runs, "target_modules")
        if not names:
            raise TargetError(
                f"target_modules: no module is called {pattern!r} in {type(model).__name__}."
                f"{did_you_mean(pattern, {leaf(name) for name in runs})}"
            )
        chosen |= {runs[name] for name in names}
    left = narrow(chosen, list(runs), exclude, layers, roles)
    inside = [runs[name] for name in left if not within(runs[name], fully_trained)]
    if not inside:
        raise TargetError(
            f"Nothing to adapt: target_modules={targets!r}, exclude_modules={exclude!r}, layers={layers!r} and "
            f"modules_to_save leave no module of {type(model).__name__}."
        )
    return list(dict.fromkeys(inside))


def narrow(
    chosen: Collection[str],
    among: Sequence[str],
    exclude: Patterns = None,
    layers: Sequence[int] | None = None,
    roles: Mapping[str, set[str]] | None = None,
) -> list[str]:
    """Leave out of ``chosen`` what ``exclude`` matches and what is in none of ``layers``; in the order of ``among``.

    Raises:
        TargetError: a pattern or an index matches nothing ``among`` all names.
    """
    dropped: set[str] = set()
    for pattern in each_pattern(exclude):
        by_name = {name for name in among if f".{pattern}." in f".{name}."}
        matched = by_name or (roles or {}).get(pattern) or match_names(pattern, among, "exclude_modules")
        if not matched:
            parts = {part for name in among for part in name.split(".")}
            raise TargetError(f"exclude_modules: {pattern!r} matches nothing.{did_you_mean(pattern, parts)}")
        dropped |= matched
    inside = set(among) if layers is None else in_layers(layers, among)
    return [name for name in among if name in chosen and name in inside and name not in dropped]


def in_layers(layers: Sequence[int], names: Sequence[str]) -> set[str]:
    """Those of ``names`` that lie in the layers of these indices; negative ones count from each container's end.

    Raises:
        TargetError: no numbered container has such a layer.
    """
    depth: dict[str, int] = {}
    for name in names:
        if found := layer_index(name):
            depth[found[0]] = max(depth.get(found[0], 0), found[1] + 1)
    stacks = ", ".join(f"'{path}' (0 to {n - 1})" for path, n in depth.items())
    for index in layers:
        if not any(-n <= index < n for n in depth.values()):
            raise TargetError(f"layers: there is no layer {index}. Numbered layers here: {stacks or 'none'}.")
    wanted = {path: {index % n for index in layers if -n <= index < n} for path, n in depth.items()}
    return {name for name in names if (at := layer_index(name)) and at[1] in wanted[at[0]]}


def match_modules(model: nn.Module, patterns: Iterable[str], field: str) -> list[str]:
    """Paths of the modules whose name ends in one of ``patterns``; each must match a module that has parameters.

    Raises:
        TargetError: a pattern matches nothing, or only modules without parameters.
    """
    named = [(path, module) for path, module in base_modules(model) if path]
    found: list[str] = []
    for pattern in patterns:
        paths = [path for path, module in named if _ends_with(path, pattern) and any(True for _ in module.parameters())]
        if not paths:
            raise TargetError(
                f"{field}: no module with parameters is called {pattern!r} in {type(model).__name__}."
                f"{did_you_mean(pattern, {leaf(path) for path, _ in named})}"
            )
        found += [path for path in paths if path not in found]
    return [path for path in found if not any(path != other and within(path, [other]) for other in found)]


def layer_index(name: str) -> tuple[str, int] | None:
    """The outermost numbered container on a path and the index in it: ``("encoder.layer", 3)``."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part)
    return None


def pattern_value(patterns: dict[str, T], name: str, default: T) -> T:
    """The value of the first pattern (a suffix or a regular expression for the end of a path) that ``name`` matches."""
    return next((value for pattern, value in patterns.items() if matches_end(pattern, name)), default)


def matches_end(pattern: str, name: str) -> bool:
    """True if ``pattern``, read as a regular expression, matches ``name`` or ends it at a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def each_pattern(patterns: Patterns) -> Iterator[str]:
    """The patterns of a field that takes one, several or none."""
    if patterns is not None:
        yield from [patterns] if isinstance(patterns, str) else patterns


def _match_target(pattern: str, hosts: Sequence[Host], roles: dict[str, set[str]], whole: Sequence[Host]) -> set[str]:
    by_name = {host.name for host in hosts if _ends_with(host.name, pattern) or _ends_with(host.path, pattern)}
    matched = by_name or roles.get(pattern) or match_names(pattern, [host.name for host in hosts], "target_modules")
    if not matched:
        if any(_ends_with(host.name, pattern) for host in whole):
            raise TargetError(
                f"target_modules: {pattern!r} is fully trained already (modules_to_save). Take it out of one of the "
                "two; modules_to_save=None trains nothing whole."
            )
        if pattern in ("query", "key", "value") and roles["fused"]:
            raise TargetError(
                f"target_modules: {pattern!r} is not a layer of its own here: query, key and value share one weight, "
                f"as in '{min(roles['fused'])}'. Use the role 'attention', or name that layer."
            )
        hint = f" The roles {', '.join(ROLES)} need a transformer's attention." if pattern in ROLES else ""
        raise TargetError(f"target_modules: {pattern!r} matches no layer.{hint}{_known(pattern, hosts)}")
    return matched


def match_names(pattern: str, names: Iterable[str], field: str) -> set[str]:
    """Those of ``names`` that the regular expression ``pattern`` of a method's ``field`` matches whole.

    Raises:
        TargetError: it is no regular expression.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise TargetError(
            f"{field}: {pattern!r} is neither the name of a layer nor a regular expression: {error}."
        ) from error
    return {name for name in names if expression.fullmatch(name)}


def _known(pattern: str, hosts: Sequence[Host]) -> str:
    """A sentence on what could have been meant: near names if there are any, else every kind of layer there is."""
    leaves = {leaf(host.name): type(host.module).__name__ for host in hosts}
    if near := did_you_mean(pattern, leaves):
        return near
    if not leaves:
        return " It has no linear, convolution, embedding or attention layer."
    return f" Layers here: {', '.join(f'{name} ({kind})' for name, kind in leaves.items())}."


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
