"""Patterns of methods' fields and what they mean in a network: names, words, regular expressions, indices of layers.

There is one way to read them, whatever is chosen. A name is a suffix of a path. A word, such as the role "attention" or
the kind "norm", stands for names. Anything else is a regular expression for whole names. A pattern that matches nothing
is an error that says what could have been meant.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lightning_peft.errors import TargetError, did_you_mean
from lightning_peft.network.blocks import ROLES
from lightning_peft.network.parameters import expert_weights
from lightning_peft.network.walk import base_modules, leaf

Patterns = list[str] | str | None
T = TypeVar("T")


class Vocabulary:
    """What patterns can mean in one network.

    Args:
        names: what can be chosen, in the order of the model.
        words: names by role or kind.
        first: words that keep their meaning even where a layer has the same name.
        aliases: other names, by which something can be meant too.
        taken: names that cannot be chosen since modules_to_save trains what they stand for.
        kinds: what the last part of a name is, for messages; without it, all parts of the names are told.
        noun: the kind of thing that is chosen, for messages.
        below: True if a name means everything below it, too.
        model: the network itself, to look into where a pattern matches no name.
    """

    def __init__(
        self,
        names: Iterable[str],
        words: Mapping[str, set[str]] | None = None,
        *,
        first: Collection[str] = (),
        aliases: Mapping[str, str] | None = None,
        taken: Iterable[str] = (),
        kinds: Mapping[str, str] | None = None,
        noun: str = "layer",
        below: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self.names, self.words, self.aliases = list(names), words or {}, aliases or {}
        self.first, self.taken, self.kinds, self.noun, self.below = first, list(taken), kinds, noun, below
        self.model = model

    def find(self, patterns: Patterns, field: str = "target_modules") -> set[str]:
        """The names that ``patterns`` of a method's ``field`` mean.

        Raises:
            TargetError: one of them means nothing.
        """
        found: set[str] = set()
        for pattern in each_pattern(patterns):
            meant = self._match(pattern, field)
            if not meant:
                raise TargetError(f"{field}: {pattern!r} {self._reason(pattern)}")
            found |= meant
        return found

    def narrow(
        self, chosen: Collection[str], exclude: Patterns = None, layers: Sequence[int] | None = None
    ) -> list[str]:
        """Drop from ``chosen`` all that ``exclude`` means, or that is below it, and all outside of ``layers``.

        What is in the network and cannot be chosen anyway, such as a module of experts, may be excluded, too.

        Raises:
            TargetError: a pattern or an index means nothing in the network.
        """
        dropped: set[str] = set()
        for pattern in each_pattern(exclude):
            meant = self._match(pattern, "exclude_modules", excluding=True)
            modules = [] if meant or self.model is None else [path for path, _ in base_modules(self.model) if path]
            if not meant and not any(matches_end(pattern, path) for path in modules):
                parts = {part for name in (*self.names, *modules) for part in name.split(".")}
                raise TargetError(f"exclude_modules: {pattern!r} matches nothing.{did_you_mean(pattern, parts)}")
            dropped |= meant
        inside = set(self.names) if layers is None else in_layers(layers, self.names)
        return [name for name in self.names if name in chosen and name in inside and name not in dropped]

    def _match(self, pattern: str, field: str, excluding: bool = False) -> set[str]:
        if pattern in self.first and self.words.get(pattern):
            return self.words[pattern]
        named = {n for n in self.names if ends_with(n, pattern) or ends_with(self.aliases.get(n, n), pattern)}
        inside = {name for name in self.names if f".{pattern}." in f".{name}."} if excluding or self.below else set()
        if named or excluding:  # where names are chosen, a word comes before the middle part of a path
            named |= inside
        return named or self.words.get(pattern) or inside or match_names(pattern, self.names, field)

    def _reason(self, pattern: str) -> str:
        if any(ends_with(name, pattern) or (self.below and f".{pattern}." in f".{name}.") for name in self.taken):
            return (
                "is fully trained already (modules_to_save). Take it out of one of the two; modules_to_save=None fully "
                "trains nothing."
            )
        # Names that exist and cannot be chosen come first: they need other remedies than a name that does not exist.
        if pattern in ("query", "key", "value") and self.words.get("fused"):
            return (
                "is not a layer of its own here: query, key and value share one weight, as in "
                f"'{min(self.words['fused'])}'. Use the role 'attention', or name that layer."
            )
        if pattern in ("ffn", "ffn-output") and self.model is not None and (experts := expert_weights(self.model)):
            return (
                f"is made of experts here, whose weights, such as '{experts[0].full_name}', are of no layer type that "
                f"adapters are known for. SelectiveTuning(target_modules=[{leaf(experts[0].layer)!r}]) trains the "
                "weights themselves."
            )
        roles = f" The roles {', '.join(ROLES)} need a transformer's attention." if pattern in ROLES else ""
        return f"matches no {self.noun}.{roles}{self._known(pattern)}"

    def _known(self, pattern: str) -> str:
        """A sentence on what could have been meant: near names if there are any, else every name there is."""
        parts = self.kinds or {part: "" for name in self.names for part in name.split(".") if not part.isdigit()}
        if near := did_you_mean(pattern, [*parts, *([] if self.kinds else self.words)]):
            return near
        if not parts:
            return " It has no linear, convolution, embedding or attention layer."
        return f" Layers here: {', '.join(f'{name} ({kind})' if kind else name for name, kind in parts.items())}."


def in_layers(layers: Sequence[int], names: Sequence[str]) -> set[str]:
    """The ``names`` that lie in the layers of these indices; negative ones count from each container's end.

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


def match_names(pattern: str, names: Iterable[str], field: str) -> set[str]:
    """The ``names`` that the regular expression ``pattern`` of a method's ``field`` matches whole.

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


def each_pattern(patterns: Patterns) -> Iterator[str]:
    """The patterns of a field that takes one, several or none."""
    if patterns is not None:
        yield from [patterns] if isinstance(patterns, str) else patterns


def ends_with(name: str, suffix: str) -> bool:
    """True if the path ``name`` is ``suffix``, or ends in it at a dot."""
    return name == suffix or name.endswith(f".{suffix}")
