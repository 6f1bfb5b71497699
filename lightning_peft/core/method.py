"""What a PEFT method is: a frozen, keyword-only dataclass that plans which adapters go where.

A new method is one file in ``methods/``: its paper, its fields, its adapter and how that merges. It is found by being a
subclass of :class:`Method`; there is no list to add it to.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.fields import Patterns, declared_fields, expected, fits, oversized, shown
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.errors import ConfigError, PEFTError, did_you_mean


@dataclass(frozen=True)
class Placement:
    """One adapter, not yet attached, and where it goes."""

    path: str
    """Path of the host module."""
    adapter: Adapter
    part: str = ""
    """Tells several adapters of one name on one host apart."""


@dataclass(frozen=True)
class Plan:
    """What a method would do to a model."""

    placements: list[Placement]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Layers that an automatic choice passed over: (name, reason)."""
    notes: list[str] = field(default_factory=list)
    """Lines for the report."""


class Method(ABC):
    """Base of all methods. Subclasses are frozen, keyword-only dataclasses; planning never changes the model."""

    modules_to_save: Patterns
    """Modules fully trained beside the adapters: name suffixes, ``"auto"`` (the task head), or None."""
    exclusive: ClassVar[str] = ""
    """What only one method of a combination can bring, such as ``"prompt"``; empty for most."""
    peft: ClassVar[PeftTable | None] = None
    """How the peft package has this method; None where it has none."""

    cannot_hold: ClassVar[Mapping[str, str]] = {}
    """Items of the contract that this method cannot hold, by the names of their tests (tests/conformance), and why."""

    def __post_init__(self) -> None:
        """Check the fields. A method that checks more calls this first."""
        self.check_fields()

    @property
    def starts_as_base(self) -> bool:
        """True if a fresh adapter leaves the model's output as it was (most papers initialise so)."""
        return True

    @abstractmethod
    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        """Build the adapters for ``model``.

        Args:
            model: the network; it is only read.
            fully_trained: paths of the modules that are fully trained; nothing below them is adapted.

        Raises:
            PEFTError: the method does not fit the model.
        """

    def planner_of(self, part: str) -> "Method":
        """The method that planned the adapter with this :attr:`Placement.part`, where methods plan with others."""
        return self

    def ejected(self) -> "Method":
        """The method that describes its adapters after :func:`~lightning_peft.eject`."""
        return self

    def combined(self, adapters: Mapping[str, Adapter]) -> "Method":
        """The method that describes combined ``adapters``, by their hosts' names; this is the first one's."""
        return self

    def pointed_at(self, paths: Sequence[str]) -> "Method":
        """This method with the modules ``paths`` in place of its patterns, if it has any."""
        return self

    def to_config(self) -> dict[str, Any]:
        """This method as primitives: ``{"method": "LoRA", "r": 8, ...}``."""
        values = {name: _primitive(getattr(self, name)) for name in self.field_names()}
        return {"method": type(self).__name__, **values}

    def invalid(self, name: str, words: str) -> ConfigError:
        """The error for a field that has a value it cannot have."""
        return ConfigError(f"{type(self).__name__}.{name} must be {words}, not {shown(getattr(self, name))}.")

    def check_fields(self) -> None:
        """Compare every field with its annotation.

        Raises:
            ConfigError: names the first one that has a value it cannot have.
        """
        for name, declared in declared_fields(type(self)).items():
            if oversized(getattr(self, name)):
                raise self.invalid(name, "a number of at most 64 bits")
            if not fits(value := getattr(self, name), declared):
                raise self.invalid(name, expected(declared, value))

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of this method's fields."""
        return [f.name for f in fields(cls)]  # type: ignore[arg-type]  # subclasses are dataclasses

    @staticmethod
    def from_config(config: Any) -> "Method":
        """Build the method that :meth:`to_config` described.

        Only names of known methods are looked up; a config cannot name any other class.

        Raises:
            ConfigError: unknown method, unknown field, or a value that a field cannot have.
        """
        known = {method.__name__: method for method in registered_methods()}
        if not isinstance(config, Mapping) or not isinstance(name := config.get("method"), str) or name not in known:
            found = config.get("method") if isinstance(config, Mapping) else config
            raise ConfigError(
                f"There is no method {shown(found)}; methods: {', '.join(known)}.{did_you_mean(shown(found), known)} "
                "Import a method of your own before its files are read."
            )
        # Only registered names are looked up above: a file can name no other class.
        values = {key: value for key, value in config.items() if key != "method"}
        allowed = set(known[name].field_names())
        if unknown := sorted(key if isinstance(key, str) else shown(key) for key in set(values) - allowed):
            raise ConfigError(
                f"{name} has no field {', '.join(map(repr, unknown))}; fields: {', '.join(sorted(allowed))}."
                f"{did_you_mean(unknown[0], allowed)} A newer version of lightning_peft may have written this."
            )
        try:
            method = known[name](**{key: _revived(value) for key, value in values.items()})
        except PEFTError:
            raise
        except RecursionError:
            raise ConfigError(f"{name}: the methods in it are nested without end.") from None
        except Exception as error:
            raise ConfigError(f"{name} cannot be made of the values given: {type(error).__name__}: {error}.") from error
        method.check_fields()  # of a method that forgets to
        return method


def registered_methods(base: type[Method] = Method) -> Iterator[type[Method]]:
    """Yield every concrete method that is defined, also in other packages."""
    for cls in base.__subclasses__():
        if not getattr(cls, "__abstractmethods__", None):
            yield cls
        yield from registered_methods(cls)


def _primitive(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_config()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _primitive(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _primitive(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_primitive(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    return value


def _revived(value: Any) -> Any:
    if isinstance(value, Mapping) and "method" in value:
        return Method.from_config(value)
    if isinstance(value, list):
        return [_revived(item) for item in value]
    return value
