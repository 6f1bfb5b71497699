"""The three kinds of adapter, and the slots that hold them on their host.

An adapter is a child of its host module at ``<host>.peft.<slot>`` and acts through the host's forward hooks, so the
base keeps its class, its parameter names and its values. A slot is called after the adapter (``default``); where one
adapter needs several slots on one host, the others are ``default:<part>``.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import NotMergeableError

CHILD = "peft"  # the name under which a host carries its slots


class Adapter(nn.Module):
    """Base of the three kinds. Floating-point parameters ignore casts to 16 bits: adapters train in full precision."""

    trains: frozenset[str] = frozenset()
    """Names of the parameters that train, noted when the adapter is attached; the others stay as they were made."""

    def train_parameters(self, mode: bool = True) -> None:
        """Let the parameters of :attr:`trains` require a gradient, or not."""
        for name, parameter in self.named_parameters():
            if name in self.trains:
                parameter.requires_grad_(mode)

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fold this adapter into its host.

        Args:
            parameters: the host's own parameters by name, in at least fp32.

        Returns:
            The new values of those parameters that change, in the same shapes.

        Raises:
            NotMergeableError: what this adapter computes is not a change of the host's parameters.
        """
        raise NotMergeableError(
            f"{type(self).__name__} cannot be merged: what it computes is no change of its host's weights. "
            "Keep it as an adapter."
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(moved.device, torch.float32) if narrowed else moved

        super()._apply(keep_precision, recurse)
        return self


class OutputAdapter(Adapter):
    """Acts after the host: ``forward(x, y) -> y'`` with the host's first input ``x`` and its output ``y``."""


class InputAdapter(Adapter):
    """Acts before the host: ``forward(args, kwargs) -> (args, kwargs)``."""


class WeightAdapter(Adapter):
    """Acts on what the host reads: ``forward(weight, name) -> weight'`` for each of :attr:`names`.

    For hosts that read a weight themselves (``nn.MultiheadAttention``), and for methods that live in weight space.
    """

    names: tuple[str, ...]
    """Paths of the replaced parameters and buffers from the host, such as ``("out_proj.weight",)``."""

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self(parameters[name], name) for name in self.names}


class AdapterSlots(nn.Module):
    """All adapters of one host, and the hooks through which the active ones act, in the order of activation."""

    def __init__(self) -> None:
        super().__init__()
        self._handles: dict[type[Adapter], list[Any]] = {}
        self.active: tuple[str, ...] = ()
        self._before: tuple[InputAdapter, ...] = ()
        self._after: tuple[OutputAdapter, ...] = ()
        self._weights: tuple[WeightAdapter, ...] = ()
        self._originals: dict[str, Any] = {}  # what the weight adapters displaced, while the host runs

    def add(self, slot: str, adapter: Adapter, host: nn.Module) -> None:
        """Put ``adapter`` at ``slot``. It stays inactive until :meth:`activate`."""
        adapter.trains = frozenset(name for name, p in adapter.named_parameters() if p.requires_grad)
        self.add_module(slot, adapter)
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
        for slot in [slot for slot in self._modules if adapter_name(slot) == name]:
            del self._modules[slot]
        if not self._modules:
            for handle in chain.from_iterable(self._handles.values()):
                handle.remove()
            self._handles.clear()

    def activate(self, names: tuple[str, ...]) -> None:
        """Let exactly the adapters ``names`` act, in that order."""
        self.active = names
        chosen = [a for name in names for slot, a in self._modules.items() if adapter_name(slot) == name]
        self._before = tuple(a for a in chosen if isinstance(a, InputAdapter))
        self._after = tuple(a for a in chosen if isinstance(a, OutputAdapter))
        self._weights = tuple(a for a in chosen if isinstance(a, WeightAdapter))

    def replaces(self, name: str) -> bool:
        """Whether an acting adapter puts a tensor in place of the host's ``name``."""
        return any(name in adapter.names for adapter in self._weights)

    def restore(self, host: nn.Module) -> None:
        """Put back what the weight adapters displaced."""
        for path, original in self._originals.items():
            table, name = _table(host, path)
            table[name] = original
        if self._originals and isinstance(host, nn.RNNBase):
            _refresh_flat_weights(host)
        self._originals.clear()

    # The hooks -------------------------------------------------------------------------------------------------------

    def before(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for adapter in self._before:
            args, kwargs = adapter(args, kwargs)
        return args, kwargs

    def after(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        for adapter in self._after:
            output = adapter(args[0] if args else next(iter(kwargs.values())), output)
        return output

    def swap_in(self, host: nn.Module, args: tuple[Any, ...]) -> None:
        self.restore(host)  # torch's always_call does not cover KeyboardInterrupt
        for adapter in self._weights:
            for path in adapter.names:
                table, name = _table(host, path)
                # Only the first of several adapters sees the base's own tensor, the one to be put back.
                self._originals.setdefault(path, table[name])
                table[name] = adapter(table[name], path)
        if self._weights and isinstance(host, nn.RNNBase):
            _refresh_flat_weights(host)

    def swap_out(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.restore(host)

    def before_state_dict(self, host: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.restore(host)


def adapter_name(slot: str) -> str:
    """The adapter that a slot belongs to: ``"default"`` of ``"default:out_proj"``."""
    return slot.partition(":")[0]


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which an adapter beside ``weight`` trains: fp64 beside fp64, else fp32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def named_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterSlots]]:
    """Yield ``(path, host, slots)`` for every host below ``model`` (itself included) that carries adapters."""
    for path, module in model.named_modules():
        slots = module._modules.get(CHILD)
        if isinstance(slots, AdapterSlots):
            yield path, module, slots


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without the adapters."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, AdapterSlots):
            inside.update(map(id, module.modules()))
        if id(module) not in inside:
            yield path, module


def _table(host: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """The parameter or buffer table that holds ``path`` of ``host``, and the name in it."""
    prefix, _, name = path.rpartition(".")
    owner = host.get_submodule(prefix) if prefix else host
    return (owner._parameters if name in owner._parameters else owner._buffers), name


def _refresh_flat_weights(rnn: nn.RNNBase) -> None:
    # Recurrent layers read their weights through a list of their own, made when a weight is assigned.
    rnn._flat_weights = [getattr(rnn, name) for name in rnn._flat_weights_names]
