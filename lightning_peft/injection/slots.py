"""Where adapters sit: the slots of a host, and the hooks through which they act.

The adapter ``name`` of a host is its child ``<host>.peft.<slot>``. A slot is called after the adapter (``default``);
where one adapter needs several slots on one host, the others are ``default:<part>``.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks

from lightning_peft.core.adapter import Adapter, InputAdapter, OutputAdapter, WeightAdapter
from lightning_peft.network.calls import first_input
from lightning_peft.network.walk import CHILD, Beside, leaf, modules_outside, parent

_Kinds = tuple[tuple[InputAdapter, ...], tuple[OutputAdapter, ...], tuple[WeightAdapter, ...]]
_NONE: _Kinds = ((), (), ())


class AdapterSlots(Beside):
    """All adapters of one host, and the hooks through which the active ones act, in the order of activation."""

    active: tuple[str, ...]
    _handles: dict[type[Adapter], list[Any]]
    _parts: dict[str, dict[str, Adapter]]  # by the adapter's name, and by part
    _own: dict[str, _Kinds]  # the same, by what they act on
    _before: tuple[InputAdapter, ...]
    _after: tuple[Callable[[Any, Any], Any], ...]
    _weights: tuple[WeightAdapter, ...]
    _displaced: dict[str, tuple[Any, Any]]  # while the host runs: the displaced tensor, and its replacement

    def __init__(self) -> None:
        super().__init__()
        # Not by assignment, which nn.Module makes slow, here as in :meth:`activate`: there is one for each layer.
        vars(self).update(active=(), _handles={}, _parts={}, _own={}, _before=(), _after=(), _weights=(), _displaced={})

    def add(self, slot: str, adapter: Adapter, host: nn.Module) -> None:
        """Put ``adapter`` at ``slot``. It stays inactive until :meth:`activate`."""
        adapter.trains = frozenset(name for name, p in adapter.named_parameters() if p.requires_grad)
        self.add_module(slot, adapter)
        self._note(adapter_name(slot))
        # Bound methods, not closures: after a deepcopy of the host they call the copy's adapters.
        if isinstance(adapter, InputAdapter) and InputAdapter not in self._handles:
            self._handles[InputAdapter] = [host.register_forward_pre_hook(self.before, with_kwargs=True)]
        elif isinstance(adapter, OutputAdapter) and OutputAdapter not in self._handles:
            self._handles[OutputAdapter] = [host.register_forward_hook(self.after, with_kwargs=True)]
        elif isinstance(adapter, WeightAdapter) and WeightAdapter not in self._handles:
            self._handles[WeightAdapter] = [
                host.register_forward_pre_hook(self.swap_in, prepend=True),
                # always_call: an exception inside the host must not leave a swapped weight behind.
                host.register_forward_hook(self.swap_out, prepend=True, always_call=True),
                host.register_state_dict_pre_hook(self.before_state_dict),
            ]

    def discard(self, name: str, host: nn.Module) -> None:
        """Drop every slot of adapter ``name``, and the hooks when nothing is left."""
        self.restore(host)
        self.activate(tuple(other for other in self.active if other != name))
        self.drop(lambda slot, _: adapter_name(slot) == name)
        if not self._modules:
            for handle in chain.from_iterable(self._handles.values()):
                handle.remove()
            self._handles.clear()

    def drop(self, goes: Callable[[str, nn.Module], bool]) -> None:
        """Drop the adapters for which ``goes(slot, adapter)`` is true; the hooks stay."""
        for slot in [slot for slot, adapter in self.named_children() if goes(slot, adapter)]:
            del self._modules[slot]
            self._note(adapter_name(slot))

    def rename(self, old: str, new: str) -> None:
        """Call the adapter ``old`` by another name, at the same place among the others."""
        moved = {slot: slot_name(new, part_name(slot)) for slot in self._modules if adapter_name(slot) == old}
        children = {moved.get(slot, slot): child for slot, child in self._modules.items()}
        self._modules.clear()
        self._modules.update(children)
        self._note(old)
        self._note(new)
        self.active = tuple(new if name == old else name for name in self.active)

    def activate(self, names: tuple[str, ...]) -> None:
        """Let exactly the adapters ``names`` act, in that order."""
        before, after, weights = self.of(*names)
        vars(self).update(active=names, _before=before, _after=after, _weights=weights)

    def train_parameters(self, modes: Mapping[str, bool]) -> None:
        """Let the parameters of these adapters require a gradient, or not."""
        for name, mode in modes.items():
            for adapter in self.parts(name).values():
                adapter.train_parameters(mode)

    def act_by_row(self, names: tuple[str, ...], *after: Callable[[Any, Any], Any]) -> None:
        """Let only ``after`` act, called with input and output, in place of the adapters ``names``."""
        vars(self).update(active=names, _before=(), _after=after, _weights=())

    def of(self, *names: str) -> "_Kinds":
        """The adapters ``names`` by kind (of the input, of the output, of weights), each in their order."""
        if len(names) == 1:
            return self._own.get(names[0], _NONE)
        before, after, weights = (tuple(chain(*kind)) for kind in zip(_NONE, *map(self.of, names), strict=True))
        return tuple(sorted(before, key=_before)), tuple(sorted(after, key=_behind)), weights

    def acting(self) -> list[Adapter]:
        """The adapters that act, in the order of activation."""
        return [adapter for name in self.active for adapter in self.parts(name).values()]

    def needs_whole_sequences(self) -> bool:
        """True if anything that acts here has to see rows of a batch whole, each of them one text."""
        acting: Any = (*self._before, *self._after, *self._weights)
        routed = not all(isinstance(one, Adapter) for one in acting)
        return routed or any(
            getattr(module, "needs_whole_sequences", False) for one in acting for module in one.modules()
        )

    def parts(self, name: str) -> Mapping[str, Adapter]:
        """Every adapter ``name`` by part, those too that act on nothing by themselves."""
        return self._parts.get(name, {})

    def _note(self, name: str) -> None:
        """Keep the adapters ``name`` at hand: switching goes through all layers of a model."""
        slots = {part_name(slot): child for slot, child in self.named_children() if adapter_name(slot) == name}
        parts = {part: child for part, child in slots.items() if isinstance(child, Adapter)}
        own = list(parts.values())
        before = sorted((a for a in own if isinstance(a, InputAdapter)), key=_before)
        after = sorted((a for a in own if isinstance(a, OutputAdapter)), key=_behind)
        self._own[name] = tuple(before), tuple(after), tuple(a for a in own if isinstance(a, WeightAdapter))
        self._parts[name] = parts
        if not own:
            del self._own[name], self._parts[name]

    def replaces(self, name: str) -> bool:
        """True if an acting adapter puts a tensor in place of the host's ``name``."""
        return any(name in adapter.names for adapter in self._weights)

    def restore(self, host: nn.Module, ran: bool = False) -> None:
        """Put back what the weight adapters displaced.

        Unless the host ``ran`` to its end just now, something else may have done so: ``torch.func.functional_call``
        leaves the base's own tensors behind when it is interrupted, and displaced were those that it was given.
        """
        for path, (original, replacement) in self._displaced.items():
            table, name = _table(host, path)
            if ran or table[name] is replacement:
                table[name] = original
        if self._displaced and isinstance(host, nn.RNNBase):
            _refresh_flat_weights(host)
        self._displaced.clear()

    def run(self, host: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``forward`` of the host with the hooks below around it, as torch does when the host is called."""
        self.swap_in(host, args)
        try:
            args, kwargs = self.before(host, args, kwargs)
            output = forward(*args, **kwargs)
        finally:
            self.swap_out(host, args, None)
        return self.after(host, args, kwargs, output)

    # The hooks -------------------------------------------------------------------------------------------------------

    def before(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for adapter in self._before:
            args, kwargs = adapter(args, kwargs)
        return args, kwargs

    def after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, owns_output = first_input(args, kwargs), self._is_first(host)
        for adapter in self._after:
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
            and "forward" not in vars(host)  # put around the module's own by another library
        )

    def swap_in(self, host: nn.Module, args: tuple[Any, ...]) -> None:
        self.restore(host)  # torch's always_call does not cover KeyboardInterrupt
        for adapter in self._weights:
            for path in adapter.names:
                table, name = _table(host, path)
                # Only the first of several adapters sees the base's own tensor, the one to be put back.
                original, _ = self._displaced.get(path, (table[name], None))
                table[name] = adapter(table[name], path)
                self._displaced[path] = original, table[name]
        if self._weights and isinstance(host, nn.RNNBase):
            _refresh_flat_weights(host)

    def swap_out(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.restore(host, ran=True)

    def before_state_dict(self, host: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.restore(host)


def adapter_name(slot: str) -> str:
    """The adapter that a slot belongs to: ``"default"`` of ``"default:out_proj"``."""
    return slot.partition(":")[0]


def owner_of(key: str) -> tuple[str, str] | None:
    """The path of the host and the adapter's name, of the name of an adapter's tensor; None for a name of the base."""
    host, found, rest = f".{key}".partition(f".{CHILD}.")
    return (host[1:], adapter_name(rest.partition(".")[0])) if found else None


def part_name(slot: str) -> str:
    """Which of an adapter's several on one host it is: ``"out_proj"`` of ``"default:out_proj"``, else empty."""
    return slot.partition(":")[2]


def slot_name(name: str, part: str) -> str:
    """The slot of one part of adapter ``name``; an adapter of a single part has none."""
    return f"{name}:{part}" if part else name


def _before(adapter: Adapter) -> int:
    return adapter.nesting


def _behind(adapter: Adapter) -> int:
    return -adapter.nesting


def named_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterSlots]]:
    """Yield ``(path, host, slots)`` for every host below ``model`` (itself included) that carries adapters."""
    for path, module in modules_outside(model):
        slots = module._modules.get(CHILD)
        if isinstance(slots, AdapterSlots):
            yield path, module, slots


def _table(host: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """The table of parameters, buffers or plain attributes that holds ``path`` of ``host``, and the name in it."""
    owner, name = host.get_submodule(parent(path)) if "." in path else host, leaf(path)
    return next(table for table in (owner._parameters, owner._buffers, vars(owner)) if name in table), name


def _refresh_flat_weights(rnn: nn.RNNBase) -> None:
    # Recurrent layers read their weights through a list of their own, made when a weight is assigned.
    rnn._flat_weights = [getattr(rnn, name) for name in rnn._flat_weights_names]
