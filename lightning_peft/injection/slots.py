"""Where adapters sit: the slots of a host, and the hooks through which they act.

The adapter ``name`` of a host is its child ``<host>.peft.<slot>``. A slot is called after the adapter (``default``);
where one adapter needs several slots on one host, the others are ``default:<part>``.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks

from lightning_peft.core.adapter import Adapter, CallAdapter, InputAdapter, OutputAdapter, WeightAdapter
from lightning_peft.errors import NotApplicableError
from lightning_peft.injection.lazy import Later
from lightning_peft.injection.names import adapter_name, part_name, slot_name
from lightning_peft.injection.rebinding import holds
from lightning_peft.injection.scopes import Scopes
from lightning_peft.injection.standins import Changes, HeldForward, is_own_forward, value_at
from lightning_peft.network.calls import first_input
from lightning_peft.network.walk import CHILD, Beside, modules_outside

_is_compiling = torch.compiler.is_dynamo_compiling
_holding = threading.Lock()  # not on the way of a forward


class Kinds(NamedTuple):
    """Adapters of one host by what they act on, each in the order in which they act."""

    before: tuple[InputAdapter, ...] = ()
    around: tuple[CallAdapter, ...] = ()
    weights: tuple[WeightAdapter, ...] = ()
    after: tuple[Any, ...] = ()
    """Output adapters, or what acts on rows in their place: called with input and output."""
    by_row: Any = None
    """With a route that has adapters inside of the host: what runs its forward for the rows of each."""


_NONE = Kinds()


class AdapterSlots(Beside):
    """All adapters of one host, and the hooks through which the active ones act, in the order of activation."""

    _default: tuple[str, ...]  # what acts where no scope says otherwise
    _path: str  # of the host
    _scopes: Scopes  # of the model, shared by all its hosts
    _handles: dict[str, Any]
    _parts: dict[str, dict[str, Adapter]]  # by the adapter's name, and by part
    _kinds: dict[tuple[str, ...], Kinds]  # of adapters together, made when they are first wanted
    _acting: Kinds  # those of the default
    ran: bool
    """True if the host has run, or its weights were read, since that was last asked for."""

    def __init__(self, path: str = "", scopes: Scopes | None = None) -> None:
        super().__init__()
        # Not by assignment, which nn.Module makes slow, here as in :meth:`activate`: there is one for each layer.
        vars(self).update(_path=path, _scopes=scopes or Scopes(), _default=(), _acting=_NONE)
        vars(self).update(_handles={}, _parts={}, _kinds={}, ran=False)

    def add(self, slot: str, adapter: Adapter, host: nn.Module) -> None:
        """Put ``adapter`` at ``slot``. It stays inactive until :meth:`activate`."""
        adapter.trains = frozenset(name for name, p in adapter.named_parameters() if p.requires_grad)
        self.add_module(slot, adapter)
        self._note(adapter_name(slot))
        # Bound methods, not closures: after a deepcopy of the host they call the copy's adapters.
        if isinstance(adapter, InputAdapter) and "before" not in self._handles:
            self._handles["before"] = host.register_forward_pre_hook(self.before, with_kwargs=True)
        elif isinstance(adapter, OutputAdapter) and "after" not in self._handles:
            self._handles["after"] = host.register_forward_hook(self.after, with_kwargs=True)
        elif isinstance(adapter, (CallAdapter, WeightAdapter)) and "check" not in self._handles:
            self.hold_forward(host)
            # It also keeps torch's fused layers from leaving the host out: they look for hooks, and not for a forward.
            self._handles["check"] = host.register_forward_pre_hook(self.check_forward)

    def hold_forward(self, host: nn.Module) -> None:
        """Have the host's forward run by :class:`HostForward` from now on; several threads may ask for it at once."""
        with _holding:
            if "forward" not in self._handles:
                self._handles["forward"] = HostForward(host, self)

    def discard(self, name: str) -> None:
        """Drop every slot of adapter ``name``, and the hooks when nothing is left."""
        self.activate(tuple(other for other in self._default if other != name))
        self.drop(lambda slot, _: adapter_name(slot) == name)
        if not self._modules:
            for handle in self._handles.values():
                handle.remove()
            self._handles.clear()

    def drop(self, goes: Callable[[str, nn.Module], bool]) -> None:
        """Drop the adapters for which ``goes(slot, adapter)`` is true; the hooks stay."""
        for slot in [slot for slot, adapter in self.named_children() if goes(slot, adapter)]:
            del self._modules[slot]
            self._note(adapter_name(slot))
        self.activate(self._default)

    def rename(self, old: str, new: str) -> None:
        """Call the adapter ``old`` by another name, at the same place among the others."""
        moved = {slot: slot_name(new, part_name(slot)) for slot in self._modules if adapter_name(slot) == old}
        children = {moved.get(slot, slot): child for slot, child in self._modules.items()}
        self._modules.clear()
        self._modules.update(children)
        self._note(old)
        self._note(new)
        vars(self)["_default"] = tuple(new if name == old else name for name in self._default)

    def activate(self, names: tuple[str, ...]) -> None:
        """Let exactly the adapters ``names`` act where no scope says otherwise, in that order."""
        vars(self).update(_default=names, _acting=self.of(*names))

    def train_parameters(self, modes: Mapping[str, bool]) -> None:
        """Let the parameters of these adapters require a gradient, or not."""
        for name, mode in modes.items():
            for adapter in self.parts(name).values():
                adapter.train_parameters(mode)

    def of(self, *names: str) -> Kinds:
        """The adapters ``names`` by kind, each in their order."""
        kinds = self._kinds.get(names)
        if kinds is None:
            kinds = self._kinds[names] = self._sorted([a for name in names for a in self.parts(name).values()])
        return kinds

    @staticmethod
    def _sorted(adapters: list[Adapter]) -> Kinds:
        inward = sorted(adapters, key=lambda adapter: adapter.nesting)
        outward = sorted(adapters, key=lambda adapter: -adapter.nesting)
        return Kinds(
            tuple(a for a in inward if isinstance(a, InputAdapter)),
            tuple(a for a in inward if isinstance(a, CallAdapter)),
            tuple(a for a in adapters if isinstance(a, WeightAdapter)),
            tuple(a for a in outward if isinstance(a, OutputAdapter)),
        )

    def acting(self) -> Kinds:
        """What acts for the code that is running."""
        scope = self._scopes.current()
        if scope is None:
            return self._acting
        if scope.route is None:
            folded = self._scopes.folded
            return self.of(*(n for n in scope.names if n not in folded)) if folded else self.of(*scope.names)
        kinds: Kinds = scope.route.acting(self, scope)
        return kinds

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the adapters that act here for the code that is running."""
        scope = self._scopes.current()
        if scope is None:
            return self._default
        here = scope.at is not None and scope.at[0] is self and scope.at[1] is not None
        return tuple(n for n in ((scope.at[1],) if here else scope.names) if n in self._parts)  # type: ignore[index]

    @property
    def unfolded(self) -> tuple[str, ...]:
        """As :attr:`active`, without those that are folded into the base."""
        return tuple(name for name in self.active if name not in self._scopes.folded)

    def acting_adapters(self) -> list[Adapter]:
        """The adapters that act for the code that is running, in the order of activation."""
        return [adapter for name in self.active for adapter in self.parts(name).values()]

    def needs_whole_sequences(self) -> bool:
        """True if anything that acts here has to see rows of a batch whole, each of them one text."""
        scope = self._scopes.current()
        routed = scope is not None and scope.route is not None
        return routed or any(
            getattr(module, "needs_whole_sequences", False)
            for one in self.acting_adapters()
            for module in one.modules()
        )

    def parts(self, name: str) -> Mapping[str, Adapter]:
        """Every adapter ``name`` by part, those too that act on nothing by themselves."""
        return self._parts.get(name, {})

    def replaces(self, name: str) -> bool:
        """True if an acting adapter puts a tensor in place of the host's ``name``."""
        return any(name in adapter.names for adapter in self.acting().weights)

    def _note(self, name: str) -> None:
        """Keep the adapters ``name`` at hand: switching goes through all layers of a model."""
        slots = {part_name(slot): child for slot, child in self.named_children() if adapter_name(slot) == name}
        self._parts[name] = {part: child for part, child in slots.items() if isinstance(child, Adapter)}
        if not self._parts[name]:
            del self._parts[name]
        self._kinds.clear()

    # The hooks -------------------------------------------------------------------------------------------------------

    def before(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.note_run()
        for adapter in self.acting().before:
            args, kwargs = adapter(args, kwargs)
        return args, kwargs

    def note_run(self) -> None:
        """Note that the host runs. Once noted this costs a look; threads all note the same."""
        if not _is_compiling() and not self.ran:
            vars(self)["ran"] = True

    def check_forward(self, host: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise if the host's forward is no longer run with its adapters.

        Raises:
            NotApplicableError: somebody has put another one in its place.
        """
        self.note_run()
        present = vars(host).get("forward")
        if present is not self._handles["forward"] and not _is_compiling():
            acting = self.acting()
            if (acting.around or acting.weights) and not self._leads_to_own(present, host):
                raise NotApplicableError(
                    f"The forward of '{self._path}' ({type(host).__name__}) was replaced after an adapter was attached "
                    "to it, which therefore does not act. Replace it first, and inject then."
                )

    def _leads_to_own(self, forward: Any, host: nn.Module) -> bool:
        """True if calling ``forward`` comes to the adapters: another library has wrapped what it found."""
        own = self._handles["forward"]
        # accelerate keeps the forward that it calls as another attribute of the module.
        return holds(forward, own) or any(value is own for value in vars(host).values())

    def after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        self.note_run()
        acting = self.acting().after
        if not acting:
            return output
        x, owns_output = first_input(args, kwargs), self._is_first(host)
        for adapter in acting:
            if owns_output and isinstance(adapter, OutputAdapter) and adapter.in_place:
                output, owns_output = adapter.forward_(x, output), not adapter.saves_output
            else:  # what comes of it may be something that its backward reads
                output, owns_output = adapter(x, output), False
        return output

    def _is_first(self, host: nn.Module) -> bool:
        """True if nobody has seen the host's output before the adapters do."""
        return (
            not torch.compiler.is_compiling()
            and next(iter(host._forward_hooks.values()), None) == self.after
            and not _global_forward_hooks
            and ("forward" not in vars(host) or is_own_forward(host))
        )


class HostForward(HeldForward):
    """The forward of a host, with the adapters that act around it and on what it reads."""

    def __init__(self, host: nn.Module, slots: AdapterSlots) -> None:
        super().__init__(host)
        self.slots = slots

    @property
    def where(self) -> str:
        return f"'{self.slots._path}' ({super().where})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kinds = self.slots.acting()
        if kinds.by_row is not None and self.holds:
            return kinds.by_row(self, args, kwargs)
        return self.call(self._changes(kinds), args, kwargs)

    def changes(self) -> Changes | None:
        return self._changes(self.slots.acting())

    def _changes(self, kinds: Kinds) -> Changes | None:
        if not (kinds.weights or kinds.around) or not self.holds:
            return None
        made: dict[str, Any] = {}
        readers: dict[str, WeightAdapter] = {}
        for adapter in kinds.weights:
            if adapter.computed_when_read:
                readers |= dict.fromkeys(adapter.names, adapter)
                continue
            for path in adapter.names:
                made[path] = adapter(made[path] if path in made else value_at(self.host, path), path)
        if readers:
            acting = self.slots.unfolded
            for path, adapter in readers.items():
                compute = partial(adapter, made[path] if path in made else value_at(self.host, path), path, acting)
                made[path] = compute() if _is_compiling() else Later(compute)
        return made, kinds.around


def named_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterSlots]]:
    """Yield ``(path, host, slots)`` for every host below ``model`` (itself included) that carries adapters."""
    for path, module in modules_outside(model):
        slots = module._modules.get(CHILD)
        if isinstance(slots, AdapterSlots):
            yield path, module, slots
