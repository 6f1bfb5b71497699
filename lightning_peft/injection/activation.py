"""Which adapters of a model act."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_peft.injection.registry import Registry, find_in, registries
from lightning_peft.injection.scopes import Scope


def activate(model: nn.Module, *names: str) -> None:
    """Let exactly the adapters ``names`` act and train, in that order. No weight is touched.

    Raises:
        AdapterNameError: one of them is not there.
    """
    for registry, chosen in _choose(model, names):
        if chosen != registry.active:
            registry.scopes.default_changes()
        registry.activate(chosen)
        modes = {name: name in chosen for name, a in registry.attachments.items() if a.trains or name in chosen}
        for slots in registry.slots.values():
            slots.train_parameters(modes)
        for name, mode in modes.items():
            registry.attachments[name].trains = mode


@contextmanager
def active(model: nn.Module, *names: str) -> Iterator[None]:
    """Within the ``with`` block, let exactly the adapters ``names`` act. What trains stays as it is.

    Raises:
        AdapterNameError: one of them is not there.
    """
    entered = [(registry.scopes, Scope(acting)) for registry, acting in _choose(model, names)]
    try:
        for scopes, scope in entered:
            scopes.enter(scope)
        yield
    finally:
        for scopes, scope in entered:
            scopes.leave(scope)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the ``with`` block the model is its base: no adapter acts, saved modules use their original weights."""
    with active(model):
        yield


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that act."""
    return tuple(name for _, _, registry in registries(model) for name in registry.acting())


def _choose(model: nn.Module, names: tuple[str, ...]) -> list[tuple[Registry, tuple[str, ...]]]:
    found = registries(model)
    for name in names:
        find_in(found, model, name)
    for _, _, registry in found:
        registry.check_settled()
    names = tuple(dict.fromkeys(names))
    return [(registry, tuple(n for n in names if n in registry.attachments)) for _, _, registry in found]
