"""One batch, many adapters: each row gets its own.

Adapters of a host's output act on their rows of it, together where their method knows how
(:meth:`~lightning_peft.core.adapter.OutputAdapter.batched`). What acts before a host or on its weights has all of the
host run once for each such adapter, on its rows alone. Below a host that runs so, all rows have one adapter: it acts as
if it were the only one. So every method can be mixed with every other, prompts of different lengths included.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_peft.core.adapter import BatchedForm, OutputAdapter
from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.injection.registry import Registry, find_in, registries
from lightning_peft.injection.slots import AdapterSlots
from lightning_peft.network.walk import base_modules
from lightning_peft.prompting.call import is_cache
from lightning_peft.routing.rows import Assignment, Group, joined, joined_cache, swapped, tensors


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the ``with`` block each row of the batch gets its own adapter, of any mix of methods; None is the base.

    The output equals the outputs of each adapter run alone on its rows, in training too. What trains stays as it is.
    With gradient checkpointing, call ``backward`` within the block.

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
    # One object for all hosts: below a host that runs by adapter it holds the rows of that adapter alone.
    current = _Route(names)
    with ExitStack() as stack:
        for _, owner, registry in found:
            stack.enter_context(_routed(owner, registry, current))
        handles = [model.register_forward_pre_hook(current.enter, with_kwargs=True)]
        handles += [child.register_forward_pre_hook(current.note, with_kwargs=True) for child in model.children()]
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def _routed(owner: nn.Module, registry: Registry, current: "_Route") -> Iterator[None]:
    names = tuple(dict.fromkeys(n for n in current.rows.names if n is not None and n in registry.attachments))
    before = registry.active
    routed = [
        _RoutedHost(path, owner.get_submodule(path), slots, names, current) for path, slots in registry.slots.items()
    ]
    registry.active, registry.routed = names, True
    try:
        for host in routed:
            host.enter()
        yield
    finally:
        for host in routed:
            host.leave()
        registry.routed = False
        registry.activate(before)


class _Route:
    """Which adapter each row gets, in the part of the batch that is being computed."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.lengths: set[int] = set()
        """How many places of a flattened tensor may belong to one row: what was seen behind the rows in this batch."""
        self.rows = Assignment(names, self.lengths)

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.lengths.clear()
        _check_packed("the model", (args, kwargs))
        first = next(tensors((args, kwargs)), None)
        if first is not None and len(first) != len(self.rows):
            raise ConfigError(
                f"route has names for {len(self.rows)} rows, and {type(model).__name__} was called with "
                f"{len(first)} (a tensor of shape {tuple(first.shape)}). Give one name for each row of the batch."
            )
        self.note(model, args, kwargs)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in tensors((args, kwargs)):
            self._note(tensor)

    def of(self, where: str, call: Any) -> Assignment:
        """The assignment of the rows that a host is called with.

        Raises:
            ConfigError: it is called with another number of rows.
        """
        x, count = next(tensors(call), None), len(self.rows)
        _check_packed(where, call)
        if x is None or len(x) in (1, count):
            if x is not None:
                self._note(x)
            return self.rows
        width, rest = divmod(len(x), count)
        if rest or width not in self.lengths:
            raise ConfigError(
                f"route has names for {count} rows, and {where} is called with a tensor of shape {tuple(x.shape)}, "
                f"whose first dimension is neither {count} nor {count} times a length seen before. Give one name for "
                "each row; where the model drops or sorts rows, run the adapters one by one: with active(model, name)."
            )
        return self.rows.repeated(width)

    def _note(self, x: Tensor) -> None:
        if len(x) == len(self.rows):
            self.lengths.update(math.prod(x.shape[1:end]) for end in range(2, x.dim() + 1))


class _RoutedHost:
    """One host while a route is active."""

    def __init__(
        self, path: str, host: nn.Module, slots: AdapterSlots, names: tuple[str, ...], current: _Route
    ) -> None:
        self.host, self.slots, self.current = host, slots, current
        self.where = f"'{path}'" if path else f"the {type(host).__name__}"
        self.outputs: dict[str, tuple[OutputAdapter, ...]] = {}
        # What acts before the host or on its weights cannot act on some rows of one call.
        apart: list[str] = []
        for name in names:
            before, after, weights = slots.of(name)
            if before or weights:
                apart.append(name)
            elif after:
                self.outputs[name] = after
        self.names = (*apart, *self.outputs)
        self.apart = frozenset(apart)
        self.forms = _forms(self.outputs)
        self.one_by_one = [name for name in self.outputs if not any(name in names for names, _ in self.forms)]
        self.order: list[str] = []
        self.layer = getattr(host, "layer_idx", None)
        self.forward: Any = None
        if apart:
            self.__signature__ = inspect.signature(host.forward)  # what asks for the forward's gets it
            self.order = list(self.__signature__.parameters)

    def enter(self) -> None:
        self._idle()
        if self.apart:
            self._install()

    def leave(self) -> None:
        if self.apart:
            self._uninstall()

    def act(self, x: Any, y: Any) -> Any:
        """Let each adapter act on its rows of the host's output ``y``."""
        rows = self.current.rows
        if len(rows.present) == 1:
            for adapter in self.outputs.get(rows.names[0] or "", ()):
                y = adapter(x, y)
            return y
        if rows.present.isdisjoint(self.outputs):
            return y
        rows = self.current.of(self.where, (x, y))
        for names, form in self.forms:
            if not rows.present.isdisjoint(names):
                if len(y) == 1:  # one row for all of them
                    x, y = (t.expand(len(rows), *t.shape[1:]).contiguous() for t in (x, y))  # a form may write into y
                y = form(x, y, rows.index(names, y.device))
        apart = frozenset(name for name in self.one_by_one if name in rows.present)
        if not apart:
            return y
        parts, groups = [], rows.split(apart)
        for group in groups:
            part, own = group.of(y), group.of(x)
            for adapter in self.outputs[group.name] if group.name is not None else ():
                part = adapter(own, part)
            parts.append(part)
        return joined(parts, groups, self.where)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the host's forward: run it for each adapter that acts inside, and once for all the others."""
        whole = self.current.rows
        one = len(whole.present) == 1
        groups = (whole if one else self.current.of(self.where, (args, kwargs))).split(self.apart)
        self._uninstall()  # an adapter may call the host's forward itself
        try:
            if len(groups) == 1:
                return self._run(groups[0], args, kwargs)
            recurrent = isinstance(self.host, nn.RNNBase)
            if recurrent:
                args, kwargs = _swap_state(args, kwargs)
            parts, calls = [], []
            for group in groups:
                own = tuple(group.of(value, self._argument(i), self.layer) for i, value in enumerate(args))
                named = {key: group.of(value, key, self.layer) for key, value in kwargs.items()}
                calls.append((*own, *named.values()))
                output = self._run(group, *(_swap_state(own, named) if recurrent else (own, named)))
                parts.append((output[0], swapped(output[1])) if recurrent else output)
            # A cache is handed on by reference, so the joined one has to be the caller's object.
            for cache, *caches in zip((*args, *kwargs.values()), *calls, strict=True):
                if is_cache(cache):
                    vars(cache).update(vars(joined_cache(caches, groups, self.where)))
            output = joined(parts, groups, self.where)
            return (output[0], swapped(output[1])) if recurrent else output
        finally:
            self.current.rows = whole
            self._install()
            self._idle()

    def _run(self, group: Group, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the host on the rows of ``group`` alone: with its adapter, or else with the adapters of the output."""
        self.current.rows = group.assignment
        if group.name is None:
            self.slots.act_by_row(self.names, self.act)
        else:
            self.slots.activate((group.name,))
        training = self.host.training
        if self.slots.replaces("running_mean"):  # with its own statistics, a frozen norm is in the mode that was set
            self.host.training = self.slots.training
        try:
            return self.slots.run(self.host, self.host.forward, args, kwargs)
        finally:
            self.host.training = training

    def _idle(self) -> None:
        self.slots.act_by_row(self.names, *[self.act] * (bool(self.outputs) and not self.apart))

    def _argument(self, place: int) -> str:
        return self.order[place] if place < len(self.order) else ""

    def _install(self) -> None:
        self.forward = vars(self.host).get("forward")
        self.host.forward = self  # not a closure, which would call this host from a copy of the model

    def _uninstall(self) -> None:
        del self.host.forward
        if self.forward is not None:
            self.host.forward = self.forward


def _swap_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call of a recurrent layer with the first two dimensions of its state swapped."""
    named = {key: swapped(value) if key == "hx" else value for key, value in kwargs.items()}
    return (*args[:1], *map(swapped, args[1:])), named


def _check_packed(where: str, call: Any) -> None:
    if _packed(call):
        raise NotApplicableError(
            f"{where} is called with a PackedSequence, where rows are not one behind the other. Pad instead, or run "
            "the adapters one by one: with active(model, name)."
        )


def _packed(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_packed, value.values()))
    return isinstance(value, PackedSequence) or (isinstance(value, (tuple, list)) and any(map(_packed, value)))


def _forms(outputs: dict[str, tuple[OutputAdapter, ...]]) -> list[tuple[tuple[str, ...], BatchedForm]]:
    """The faster forms of adapters that are alone in the output of a host, with the names of those in each."""
    kinds: dict[type[OutputAdapter], dict[str, OutputAdapter]] = {}
    for name, adapters in outputs.items():
        if len(adapters) == 1:
            kinds.setdefault(type(adapters[0]), {})[name] = adapters[0]
    made = [(tuple(own), kind.batched(list(own.values()))) for kind, own in kinds.items() if len(own) > 1]
    return [(names, form) for names, form in made if form is not None]
