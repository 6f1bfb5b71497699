"""A module that reads other tensors than its own, for one call, without being changed.

A stand-in is a second object of the module's class that shares all that the module has, but for the tables in which
something is replaced. Torch makes its replicas for ``nn.DataParallel`` in the same way. Nothing refers to a stand-in
after the call, so calls on other threads never meet it.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from lightning_peft.core.adapter import CallAdapter, Run
from lightning_peft.network.walk import leaf, parent

_TABLES = ("_parameters", "_buffers")
_MISSING: Any = object()


class HeldForward:
    """What is called as the forward of a module, in its attribute of that name, until it is removed.

    A hook cannot make a module call something else. This is an object and not a bound method: its signature is the
    module's own, it can be traced, and copies and pickles of the module have one of their own.
    """

    def __init__(self, host: nn.Module) -> None:
        self.host, self.holds = host, True
        self.before = vars(host).get("forward")  # put there by another library, or for another reason
        vars(host)["forward"] = self

    def remove(self) -> None:
        """Give the forward back, as a hook's handle does. Where another library has wrapped this one, it passes on."""
        self.holds = False
        if vars(self.host).get("forward") is self:
            del vars(self.host)["forward"]
            if self.before is not None:
                vars(self.host)["forward"] = self.before

    def replaced(self) -> Mapping[str, Any]:
        """What the forward is to read in place of the module's own, by path, as :func:`stand_in` takes it."""
        return {}

    def around(self) -> Sequence[CallAdapter]:
        """The adapters that act around the forward."""
        return ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the forward, on a stand-in if there is anything to replace."""
        if self.holds:
            replaced, around = self.replaced(), self.around()
            if replaced or around:
                made = stand_in(self.host, replaced)
                return Run(made, around, self.forward_of)(args, kwargs)
        if self.before is None:
            return type(self.host).forward(self.host, *args, **kwargs)
        return self.before(*args, **kwargs)

    def forward_of(self, made: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module's forward on its stand-in ``made``; what it sets on itself is kept on the module."""
        forward = None if self.before is None else _rebound(self.before, self.host, made)
        if torch.compiler.is_dynamo_compiling():
            return type(self.host).forward(made, *args, **kwargs) if forward is None else forward(*args, **kwargs)
        begun = vars(made).copy()
        tables = {table: _unreplaced(begun[table], vars(self.host)[table]) for table in _TABLES}
        try:
            return type(self.host).forward(made, *args, **kwargs) if forward is None else forward(*args, **kwargs)
        finally:
            # Compared with the stand-in as it was: the module may have been changed by another thread meanwhile.
            _keep(vars(self.host), begun, vars(made))
            for table, entries in tables.items():
                _keep(vars(self.host)[table], entries, {name: begun[table][name] for name in entries})

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
        replaced: new values by path from the host: ``weight``, ``out_proj.weight``, ``training``.
    """
    made = _shared(host)
    below: dict[str, nn.Module] = {"": made}
    own: set[int] = set()  # the tables that are the stand-ins' own by now

    def table_of(module: nn.Module, table: str) -> dict[str, Any]:
        if id(vars(module)[table]) not in own:
            vars(module)[table] = {**vars(module)[table]}
            own.add(id(vars(module)[table]))
        entries: dict[str, Any] = vars(module)[table]
        return entries

    def child(path: str) -> nn.Module:
        if path not in below:
            children = table_of(child(parent(path)), "_modules")
            children[leaf(path)] = below[path] = _shared(children[leaf(path)])
        return below[path]

    for path, value in replaced.items():
        owner, name = child(parent(path)), leaf(path)
        table = next((table for table in _TABLES if name in vars(owner)[table]), None)
        entries = vars(owner) if table is None else table_of(owner, table)
        entries[name] = value
    if isinstance(host, nn.RNNBase):
        # It reads its weights through a list, which it would make anew, and keep, if these are not those that it noted.
        names: list[str] = vars(made)["_flat_weights_names"]
        vars(made)["_flat_weights"] = [vars(made)["_parameters"][name] for name in names]
        vars(made)["_flat_weight_refs"] = [None] * len(names)
    return made


def value_at(host: nn.Module, path: str) -> Any:
    """The parameter, buffer or plain attribute ``path`` of ``host``."""
    owner, name = host.get_submodule(parent(path)) if "." in path else host, leaf(path)
    return next(table for table in (owner._parameters, owner._buffers, vars(owner)) if name in table)[name]


def is_own_forward(host: nn.Module) -> bool:
    """True if calling ``host`` runs the forward of its class, and no other library's around it."""
    forward = vars(host).get("forward")
    while isinstance(forward, HeldForward):
        forward = forward.before
    return forward is None


def _shared(module: nn.Module) -> nn.Module:
    made: nn.Module = object.__new__(type(module))  # __init__ would make parameters; FSDP's __new__ another class
    vars(made).update(vars(module))
    return made


def _unreplaced(table: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The entries of a stand-in's own table that are the module's; a table that both share has no need to be kept."""
    return {} if table is own else {name: value for name, value in table.items() if own.get(name, _MISSING) is value}


def _keep(to: dict[str, Any], begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if begun.get(name, _MISSING) is not value:
            to[name] = value


def _rebound(forward: Callable[..., Any], host: nn.Module, made: nn.Module) -> Callable[..., Any]:
    """A forward that another library has bound to ``host``, bound to its stand-in."""
    if isinstance(forward, HeldForward):
        return forward.bound_to(made)
    if isinstance(forward, MethodType) and forward.__self__ is host:
        return MethodType(forward.__func__, made)
    if isinstance(forward, partial):
        for name, value in list(vars(made).items()):  # accelerate keeps the forward that it calls as an attribute
            if isinstance(value, (MethodType, HeldForward)):
                vars(made)[name] = _rebound(value, host, made)
        return partial(forward.func, *(made if value is host else value for value in forward.args), **forward.keywords)
    return forward
