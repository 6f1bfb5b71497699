"""What is attached to a model: the record kept on the module that :func:`~lightning_peft.inject` was called on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.method import Method
from lightning_peft.errors import AdapterNameError, NotApplicableError, did_you_mean
from lightning_peft.injection.scopes import Scopes
from lightning_peft.injection.slots import AdapterSlots
from lightning_peft.network.walk import CHILD, module_at, modules_outside

_ATTRIBUTE = "_peft_registry"


@dataclass
class AttachedAdapter:
    """One adapter of a model."""

    method: Method
    keys: frozenset[str]
    """The state-dict keys that belong to this adapter, fixed when it was attached."""
    fully_trained: tuple[str, ...]
    """Paths of the modules that are fully trained."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Layers that an automatic choice passed over, with the reason."""
    notes: tuple[str, ...] = ()
    """Lines of the method's for the report."""
    trains: bool = True
    """True if it was last let train; those that were not need not be looked at when adapters are switched."""


@dataclass
class Registry:
    """All adapters of one model, and what has to be put back when the last one goes."""

    attachments: dict[str, AttachedAdapter] = field(default_factory=dict)
    slots: dict[str, AdapterSlots] = field(default_factory=dict)
    """The slots of each host, by the host's path."""
    active: tuple[str, ...] = ()
    """The adapters that act where no scope says otherwise, in their order."""
    scopes: Scopes = field(default_factory=Scopes)
    """What acts within ``with`` blocks, by thread and task."""
    trained_before: frozenset[str] = frozenset()
    """Names of the base parameters that trained before they were frozen."""
    handles: list[Any] = field(default_factory=list)
    """Hooks on the base that go with the last adapter."""
    watch: Any = None
    """What sees whether hosts run (:class:`~lightning_peft.injection.running.RunWatch`)."""
    noted: dict[int, Any] = field(default_factory=dict)
    """What shows routes the rows that a module is called with, by the module's id."""

    def adapters(self, name: str) -> Iterator[tuple[str, Adapter]]:
        """Yield (path of the host, adapter) for every slot of adapter ``name``."""
        for path, _, adapter in self.parts(name):
            yield path, adapter

    def parts(self, name: str) -> Iterator[tuple[str, str, Adapter]]:
        """Yield (path of the host, part, adapter) for every slot of adapter ``name``."""
        for path, slots in self.slots.items():
            for part, adapter in slots.parts(name).items():
                yield path, part, adapter

    def activate(self, names: tuple[str, ...]) -> None:
        """Let exactly ``names`` act where no scope says otherwise, in that order."""
        for slots in self.slots.values():
            slots.activate(names)
        self.active = names

    def acting(self) -> tuple[str, ...]:
        """The adapters that act for the code that is running, in their order."""
        if (scope := self.scopes.current()) is None:
            return self.active
        return tuple(name for name in scope.names if name in self.attachments and name not in self.scopes.folded)

    def check_settled(self, folds: bool = False) -> None:
        """Raise while which adapters there are, and which of them act, must stay as they are.

        Args:
            folds: whether an adapter may be folded into the base now (:func:`~lightning_peft.merged`).

        Raises:
            AdapterNameError: a route is active, or an adapter is folded into the base.
        """
        scope = self.scopes.current()
        if scope is not None and scope.route is not None:
            raise AdapterNameError(
                "The rows of the batch have adapters of their own: leave the route(...) block first."
            )
        if not folds:
            self.scopes.check_unfolded()

    def check_hosts(self, owner: nn.Module) -> None:
        """Raise unless every host is the module that an adapter was attached to.

        Raises:
            NotApplicableError: another module stands in the place of one.
        """
        for path, slots in self.slots.items():
            host = module_at(owner, path)
            present = (
                None if host is None else host._modules.get(CHILD, getattr(host, CHILD, None))
            )  # it may be wrapped
            if present is not slots:
                raise NotApplicableError(
                    f"'{path}' was replaced or taken away after an adapter was attached to it, which therefore does "
                    "not act any more. Put the module back, or load the adapter into a fresh model."
                )

    def own_keys(self) -> frozenset[str]:
        """The state-dict keys of all adapters."""
        return frozenset().union(*(attachment.keys for attachment in self.attachments.values()))


def registry_of(model: nn.Module) -> Registry | None:
    """The registry of ``model`` itself, or None when nothing was injected on it."""
    return model.__dict__.get(_ATTRIBUTE)


def set_registry(model: nn.Module, registry: Registry | None) -> None:
    """Give ``model`` its registry, or take it away."""
    if registry is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = registry


def registries(model: nn.Module) -> list[tuple[str, nn.Module, Registry]]:
    """(path, module, registry) for every module at or below ``model`` that was injected on."""
    owners: set[int] = set()
    seen: set[int] = set()
    pending = [model]
    while pending:  # without paths, and with little else: switching adapters waits for this
        module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            if _ATTRIBUTE in module.__dict__:
                owners.add(id(module))
            for child in module._modules.values():
                if child is not None and type(child) is not AdapterSlots:
                    pending.append(child)
    if owners <= {id(model)}:
        return [("", model, registry)] if (registry := registry_of(model)) is not None else []
    placed = ((path, module, registry_of(module)) for path, module in modules_outside(model) if id(module) in owners)
    return [(path, module, registry) for path, module, registry in placed if registry is not None]


def find_adapter(model: nn.Module, name: str) -> tuple[str, nn.Module, Registry]:
    """The path, module and registry that hold adapter ``name`` at or below ``model``.

    Raises:
        AdapterNameError: there is no such adapter, or one in each of several parts.
    """
    return find_in(registries(model), model, name)


def find_in(
    found: list[tuple[str, nn.Module, Registry]], model: nn.Module, name: str
) -> tuple[str, nn.Module, Registry]:
    """As :func:`find_adapter`, in the registries of ``model`` that were ``found``."""
    holding = [entry for entry in found if name in entry[2].attachments]
    if len(holding) > 1:
        places = ", ".join(repr(path) for path, _, _ in holding)
        raise AdapterNameError(f"There are adapters called {name!r} on {places}: call this with one of these modules.")
    if holding:
        return holding[0]
    # Three mistakes look alike: a wrong name, a wrong level of the model, and an adapter that is gone.
    known = [name for _, _, registry in found for name in registry.attachments]
    if known:
        hint = f"Adapters here: {', '.join(map(repr, known))}.{did_you_mean(name, known)}"
    elif any(isinstance(module, AdapterSlots) for module in model.modules()):
        hint = "It carries adapters that were injected on a module above it: call this with the module you injected on."
    else:
        hint = "It has none: inject(model, method) first, or it was merged or removed already."
    raise AdapterNameError(f"{type(model).__name__} has no adapter {name!r}. {hint}")
