"""One batch, many adapters: each row gets its own.

Adapters of a host's output act on their rows of it, together where their method knows how
(:meth:`~lightning_peft.core.adapter.OutputAdapter.batched`). What acts before a host or on its weights has all of the
host run once for each such adapter, on its rows alone. Below a host that runs so, all rows have one adapter: it acts as
if it were the only one. So every method can be mixed with every other, prompts of different lengths included.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.injection.registry import Registry, find_in, registries
from lightning_peft.injection.scopes import Scope, Scopes
from lightning_peft.injection.slots import AdapterSlots
from lightning_peft.network.walk import base_modules
from lightning_peft.routing.hosts import Route

_noting = threading.Lock()  # not on the way of a forward


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the ``with`` block each row of the batch gets its own adapter, of any mix of methods; None is the base.

    The output equals the outputs of each adapter run alone on its rows, in training too. What trains stays as it is.

    Args:
        model: the network. The first dimension of what it is called with counts the rows.
        names: one for each row of every batch within the block.

    Raises:
        AdapterNameError: there is no adapter of that name, or a route is active already.
        ConfigError: ``names`` are not names, or not one for each row of the batch.
        NotApplicableError: the rows cannot be told where an adapter acts.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ConfigError(f"route needs a list of adapter names, one for each row of the batch, not {names!r}.")
    for name in names:
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"route needs names of adapters, or None for the base, not {name!r}.")
    # Everything is checked before the block is entered: an error in the midst of a forward comes too late.
    found = registries(model)
    for name in dict.fromkeys(names):
        if name is not None:
            find_in(found, model, name)
    for _, _, registry in found:
        registry.check_settled()
    for path, module in base_modules(model):
        if getattr(module, "batch_first", True) is False:
            raise NotApplicableError(
                f"'{path}' ({type(module).__name__}) has batch_first=False, so the first dimension does not count the "
                "rows of a batch. Set batch_first=True, or run the adapters one by one: with active(model, name)."
            )
    route = Route(names, found)
    entered = [(registry.scopes, Scope(route.names(registry), route, route.rows)) for _, _, registry in found]
    if found:
        _note_rows(model, found[0][2])
    try:
        for scopes, scope in entered:
            scopes.enter(scope)
        yield
    finally:
        for scopes, scope in entered:
            scopes.leave(scope)


def _note_rows(model: nn.Module, registry: Registry) -> None:
    """Let routes see what ``model`` is called with. The hooks stay: another thread may be calling the model now."""
    with _noting:
        if id(model) not in registry.noted:
            noted = registry.noted[id(model)] = _RowsNoted(registry.scopes)
            handles = [model.register_forward_pre_hook(noted.enter, with_kwargs=True)]
            for child in model.children():
                if isinstance(child, AdapterSlots):
                    continue
                handles.append(child.register_forward_pre_hook(noted.note, with_kwargs=True))
            registry.handles += handles


class _RowsNoted:
    """Hands what a model is called with to the route of the code that is running."""

    def __init__(self, scopes: Scopes) -> None:
        self.scopes = scopes

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scope = self.scopes.current()
        if scope is not None and scope.route is not None:
            scope.route.enter(model, args, kwargs)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scope = self.scopes.current()
        if scope is not None and scope.route is not None:
            scope.route.note(args, kwargs)
