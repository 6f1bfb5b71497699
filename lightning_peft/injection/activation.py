"""Which adapters of a model act."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_peft.injection.registry import Registry, find_in, registries
from lightning_peft.injection.scopes import Scope


def activate(model: nn.Module, *names: str) -> None:
    """Let exactly the adapters ``names`` act and train, in that order. No weight is touched.

    This holds for all threads and tasks, but for what runs within a block of :func:`active` and the like. A backward
    pass of a forward before it fails, if it has a gradient for what does not train any more.

    Raises:
        AdapterNameError: one of them is not there, or one is folded into the base now.
        NotApplicableError: a layer was replaced after an adapter was attached to it.
    """
    chosen_ones = _choose(model, names)
    # Before anything is switched: half a model would act with other adapters than the rest.
    for owner, registry, _ in chosen_ones:
        registry.check_hosts(owner)
    for _, registry, chosen in chosen_ones:
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

    This is a matter of the thread, or asyncio task, that enters the block: others see what they have chosen, or what
    :func:`activate` has set. A backward pass that computes a forward again sees what that saw, on any thread; where
    parts of ``model`` are called and not itself, on that of the forward, or one that has run nothing of the model.

    Two tasks that ``await`` within blocks on one thread cannot run compiled code in them: it falls back to eager mode,
    or raises under ``fullgraph=True``. Compiled code sees the blocks that were entered on its own thread, not those of
    a context that ``asyncio.to_thread`` hands on, and a model is compiled anew for each set of adapters, up to torch's
    limit of 8. A copy that is made within the block has none.

    Raises:
        AdapterNameError: one of them is not there, or one is folded into the base now.
    """
    entered = []
    for _, registry, acting in _choose(model, names):
        for slots in registry.slots.values():
            slots.of(*acting)  # now: compiled code guards on whether it is known
        entered.append((registry.scopes, Scope(acting)))
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


def _choose(model: nn.Module, names: tuple[str, ...]) -> list[tuple[nn.Module, Registry, tuple[str, ...]]]:
    found = registries(model)
    for name in names:
        find_in(found, model, name)
    for _, _, registry in found:
        registry.check_settled()
    names = tuple(dict.fromkeys(names))
    return [(owner, registry, tuple(n for n in names if n in registry.attachments)) for _, owner, registry in found]
