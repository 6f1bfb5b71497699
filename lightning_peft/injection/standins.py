"""A module that reads other tensors than its own, for one call, without being changed.

A stand-in is a second object of the module's class that shares all that the module has, but for the tables in which
something is replaced. Torch makes its replicas for ``nn.DataParallel`` in the same way. Nothing refers to a stand-in
after the call, so calls on other threads never meet it.
"""

import copy
import inspect
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch import nn

from lightning_peft.core.adapter import CallAdapter, Run
from lightning_peft.errors import NotApplicableError
from lightning_peft.injection.lazy import Later, LazyTable
from lightning_peft.injection.rebinding import holds, rebound
from lightning_peft.network.reads import words_of
from lightning_peft.network.walk import CHILD

_TABLES = ("_parameters", "_buffers")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_MISSING: Any = object()
_is_compiling = torch.compiler.is_dynamo_compiling
_REPARAMETRIZATIONS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm", "torch.nn.utils.prune")
_Pair = tuple[nn.Module, nn.Module]
_flagging = threading.RLock()  # of forwards that take no stand-in alone


Changes = tuple[Mapping[str, Any], Sequence[CallAdapter]]
"""What a stand-in has in place of the module's own, as :func:`stand_in` takes it, and the adapters around the call."""


class HeldForward(ABC):
    """What is called as the forward of a module, in its attribute of that name, until it is removed.

    A hook cannot make a module call something else. This is an object and not a bound method: its signature is the
    module's own, it can be traced, and copies and pickles of the module have one of their own.
    """

    def __init__(self, host: nn.Module) -> None:
        self.host, self.holds = host, True
        # Layers of torch's own set nothing on themselves; to look for it after every call would cost a tenth of it.
        self._sets = not type(host).__module__.startswith("torch.nn.modules.")
        self.before: Any = vars(host).get("forward")  # put there by another library, or for another reason
        vars(host)["forward"] = self

    def remove(self) -> None:
        """Give the forward back, as a hook's handle does. Where another library has wrapped this one, it passes on."""
        self.holds = False
        if vars(self.host).get("forward") is self:
            del vars(self.host)["forward"]
            if self.before is not None:
                vars(self.host)["forward"] = self.before

    @abstractmethod
    def changes(self) -> Changes | None:
        """What this call is to read in place of the module's own, and what acts around it; None for nothing."""

    @property
    def where(self) -> str:
        """The module, for messages."""
        return type(self.host).__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the forward."""
        return self.call(self.changes() if self.holds else None, args, kwargs)

    def call(self, changes: Changes | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the forward, on a stand-in if there are ``changes``."""
        if changes is not None:
            replaced, around = changes
            if self.before is not None and not can_stand_in(self.host):  # it holds the module as a global, for one
                return self._call_flagged(replaced, args, kwargs)
            made = stand_in(self.host, replaced)
            return Run(made, around, self.call_on)(args, kwargs) if around else self.call_on(made, args, kwargs)
        if self.before is None:
            return type(self.host).forward(self.host, *args, **kwargs)
        return self.before(*args, **kwargs)

    def call_on(self, made: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module's forward on its stand-in ``made``; what it sets on itself is kept on the module."""
        if self.before is None and (not self._sets or _is_compiling()):
            return type(self.host).forward(made, *args, **kwargs)
        forward = (
            partial(type(self.host).forward, made) if self.before is None else rebound(self.before, self.host, made)
        )
        if _is_compiling():
            return forward(*args, **kwargs)
        before, host = vars(self.host).copy(), vars(self.host)
        kept = [_Kept(module, twin) for module, twin in _pairs(self.host, made)]
        try:
            return forward(*args, **kwargs)
        finally:
            if not _are_same(before, host):
                changed = {name for name in host if before.get(name, _MISSING) is not host[name]}
                self._check_unread(changed - kept[0].changed())
            for one in kept:
                one.keep()

    def _call_flagged(self, flags: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a forward that takes no stand-in, with other flags on the module itself meanwhile.

        One thread at a time: two would each take the other's flags for the module's own.
        """
        own = vars(self.host)
        with _flagging:
            before = {name: own[name] for name in flags}
            own.update(flags)
            try:
                return self.before(*args, **kwargs)
            finally:
                own.update(before)

    def _check_unread(self, changed: set[str]) -> None:
        """Raise if something else has set an attribute of the module during the call that its forward reads.

        Raises:
            NotApplicableError: it has, such as a hook of a child's: the forward has read what was there before.
        """
        if not changed:
            return
        kind: Any = type(self.host)
        for name in changed & words_of(kind) - {"training"}:  # a mode is set for the calls to come
            raise NotApplicableError(
                f"A hook, or a module below, has set '{name}' of {self.where} while its forward, which reads that, ran "
                "with other weights and could not see it. Keep that elsewhere than on the module, or leave out what is "
                "adapted there (exclude_modules): the module itself, or a layer whose weight it reads."
            )

    def bound_to(self, host: nn.Module) -> "HeldForward":
        """The same for a stand-in of the module."""
        made = copy.copy(self)
        made.host = host
        return made

    @property
    def __signature__(self) -> inspect.Signature:  # asked for by transformers' generate
        return inspect.signature(self._own())

    @property
    def __code__(self) -> Any:  # asked for by torch.export
        return self._own().__code__

    def _own(self) -> Any:
        return MethodType(type(self.host).forward, self.host) if self.before is None else self.before


def stand_in(host: nn.Module, replaced: Mapping[str, Any]) -> nn.Module:
    """A stand-in for ``host`` that has ``replaced`` in place of these parameters, buffers or attributes.

    Args:
        host: the module; it is only read.
        replaced: new values by path from the host: ``weight``, ``out_proj.weight``, ``training``. Those that come
            :class:`Later` are computed when they are read.
    """
    made = _shared(host)
    below: dict[str, _Pair] = {"": (host, made)}
    for path, value in replaced.items():
        at, _, name = path.rpartition(".")
        module, twin = below[at] if at in below else _pair_at(at, below)
        own = vars(twin)
        for table in _TABLES:
            if name in own[table]:
                if own[table] is vars(module)[table]:
                    own[table] = own[table].copy()
                if type(value) is Later and type(own[table]) is dict:
                    own[table] = LazyTable(own[table])
                own[table][name] = value
                break
        else:
            own[name] = value
    for hook in host._forward_pre_hooks.values():
        if type(hook).__module__ in _REPARAMETRIZATIONS:
            # It has made a weight of the host's parts (weight_g, weight_orig), which is made again of what replaces
            # these. Only then, since a spectral norm moves its buffers each time.
            made_of = f"{getattr(hook, 'name', '') or getattr(hook, '_tensor_name', '')}_"
            if any(path.startswith(made_of) for path in replaced):
                hook(made, ())
    if isinstance(host, nn.RNNBase):
        # It reads its weights through a list, which it would make anew, and keep, if these are not those that it noted.
        names: list[str] = vars(made)["_flat_weights_names"]
        vars(made)["_flat_weights"] = [vars(made)["_parameters"][name] for name in names]
        vars(made)["_flat_weight_refs"] = [None] * len(names)
    return made


def _pair_at(path: str, below: dict[str, _Pair], passed: bool = False) -> _Pair:
    """A module below a host and its stand-in; the modules that are passed on the way to it have stand-ins then, too."""
    at, _, name = path.rpartition(".")
    module, twin = below[at] if at in below else _pair_at(at, below, passed=True)
    own = vars(twin)
    if own["_modules"] is vars(module)["_modules"]:
        own["_modules"] = own["_modules"].copy()
    child = own["_modules"][name]
    below[path] = child, _shared(child)
    own["_modules"][name] = below[path][1]
    if passed or CHILD in child._modules:  # only read: adapters at and in the module itself act where that is called
        vars(below[path][1]).update({**{name: OrderedDict() for name in _HOOKS}, "forward": child})
    return below[path]


def value_at(host: nn.Module, path: str) -> Any:
    """The parameter, buffer or plain attribute ``path`` of ``host``."""
    if path in host._parameters:
        return host._parameters[path]
    at, _, name = path.rpartition(".")
    owner = host._modules[at] if at in host._modules else host.get_submodule(at)
    return next(table for table in (owner._parameters, owner._buffers, vars(owner)) if name in table)[name]  # type: ignore[union-attr]


def can_stand_in(host: nn.Module) -> bool:
    """True unless the forward of ``host`` was replaced by something that cannot be given a stand-in."""
    forward = _foreign_forward(host)
    return forward is None or holds(forward, host)


def is_own_forward(host: nn.Module) -> bool:
    """True if calling ``host`` runs the forward of its class, and no other library's around it."""
    return _foreign_forward(host) is None


def _foreign_forward(host: nn.Module) -> Any:
    """What another library has put in place of the forward of ``host``, behind those that are held; None if nothing."""
    forward = vars(host).get("forward")
    while isinstance(forward, HeldForward):
        forward = forward.before
    return forward


def _shared(module: nn.Module) -> nn.Module:
    made: nn.Module = object.__new__(type(module))  # __init__ would make parameters; FSDP's __new__ another class
    own = vars(made)
    own.update(vars(module))
    if not type(module).__module__.startswith("torch.nn.modules."):
        # Methods that the module has stored on itself, as accelerate does with the forward that it wraps.
        for name, value in vars(module).items():
            if type(value) is MethodType and value.__self__ is module:
                own[name] = MethodType(value.__func__, made)
    return made


class _Kept:
    """What a forward sets on a stand-in, which is kept on the module that it stands for."""

    def __init__(self, module: nn.Module, twin: nn.Module) -> None:
        self.module, self.twin, self.begun = module, twin, vars(twin).copy()
        # Compared with the stand-in as it was: the module may have been changed by another thread meanwhile.
        own, host = vars(twin), vars(module)
        tables = [table for table in (*_TABLES, "_modules") if own[table] is not host[table]]
        self.tables = [(host[table], own[table], dict.copy(own[table])) for table in tables]

    def changed(self) -> set[str]:
        """The attributes that were set on the stand-in."""
        own = vars(self.twin)
        return {name for name, value in own.items() if self.begun.get(name, _MISSING) is not value}

    def keep(self) -> None:
        """Set on the module what was set on its stand-in; what stands in place of the module's own is not its."""
        own, host = vars(self.twin), vars(self.module)
        host.update({name: own[name] for name in self.changed()})
        for name in self.begun.keys() - own.keys():
            if host.get(name, _MISSING) is self.begun[name]:  # it has become a parameter, a buffer or a module
                del host[name]
        for table, now, then in self.tables:
            # Without a look at the values themselves, which may come later.
            for name, value in dict.items(now):
                if then.get(name, _MISSING) is not value and then.get(name) is table.get(name):
                    table[name] = value


def _pairs(module: nn.Module, twin: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """A module and its stand-in, and those below that have one, too."""
    yield module, twin
    own, before = vars(twin)["_modules"], vars(module)["_modules"]
    if own is not before:
        for name, child in own.items():
            if child is not before.get(name):
                yield from _pairs(before[name], child)


def _are_same(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """True if both hold the very same objects under the same names."""
    return len(then) == len(now) and all(map(is_, then.values(), now.values()))
