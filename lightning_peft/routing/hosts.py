"""The hosts of adapters while each row of a batch has its own: nothing of them is changed."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_peft.core.adapter import BatchedForm, OutputAdapter
from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.injection.registry import Registry
from lightning_peft.injection.scopes import Scope, Scopes
from lightning_peft.injection.slots import AdapterSlots, HostForward, Kinds
from lightning_peft.network.calls import argument_names
from lightning_peft.prompting.call import is_cache
from lightning_peft.routing.rows import Assignment, Group, joined, joined_cache, swapped, tensors


class Route:
    """Which adapter each row gets, and each host while that is so. It changes nothing of them."""

    def __init__(self, names: Sequence[str | None], found: Sequence[tuple[str, nn.Module, Registry]]) -> None:
        self.lengths: set[int] = set()
        """How many places of a flattened tensor may belong to one row: what was seen behind the rows in this batch."""
        self.rows = Assignment(names, self.lengths)
        self.hosts: dict[AdapterSlots, RoutedHost] = {}
        for _, owner, registry in found:
            for path, slots in registry.slots.items():
                host = owner.get_submodule(path)
                self.hosts[slots] = RoutedHost(path, host, slots, self.names(registry), self, registry.scopes)

    def names(self, registry: Registry) -> tuple[str, ...]:
        """The names that are adapters of ``registry``, in the order of their first row."""
        return tuple(dict.fromkeys(n for n in self.rows.names if n is not None and n in registry.attachments))

    def acting(self, slots: AdapterSlots, scope: Scope) -> Kinds:
        """What acts in the hooks of a host."""
        host = self.hosts.get(slots)
        if host is None:  # of an adapter that was injected within the block
            return Kinds()
        if scope.at is None or scope.at[0] is not slots:
            return host.idle
        return host.whole if scope.at[1] is None else slots.of(scope.at[1])

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.lengths.clear()
        _check_packed("the model", (args, kwargs))
        first = next(tensors((args, kwargs)), None)
        if first is not None and len(first) != len(self.rows):
            raise ConfigError(
                f"route has names for {len(self.rows)} rows, and {type(model).__name__} was called with "
                f"{len(first)} (a tensor of shape {tuple(first.shape)}). Give one name for each row of the batch."
            )
        self.note(args, kwargs)

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in tensors((args, kwargs)):
            self._note(tensor, self.rows)

    def of(self, rows: Assignment, where: str, call: Any) -> Assignment:
        """The assignment of the rows that a host is called with, in the part ``rows`` of the batch.

        Raises:
            ConfigError: it is called with another number of rows.
        """
        x, count = next(tensors(call), None), len(rows)
        _check_packed(where, call)
        if x is None or len(x) in (1, count):
            if x is not None:
                self._note(x, rows)
            return rows
        # Some layers see the places of all rows as one long batch: whole rows, if their lengths were seen before.
        width, rest = divmod(len(x), count)
        if rest or width not in self.lengths:
            raise ConfigError(
                f"route has names for {count} rows, and {where} is called with a tensor of shape {tuple(x.shape)}, "
                f"whose first dimension is neither {count} nor {count} times a length seen before. Give one name for "
                "each row; where the model drops or sorts rows, run the adapters one by one: with active(model, name)."
            )
        return rows.repeated(width)

    def _note(self, x: Tensor, rows: Assignment) -> None:
        if len(x) == len(rows):
            self.lengths.update(math.prod(x.shape[1:end]) for end in range(2, x.dim() + 1))


class RoutedHost:
    """One host while a route is active."""

    def __init__(
        self, path: str, host: nn.Module, slots: AdapterSlots, names: tuple[str, ...], route: Route, scopes: Scopes
    ) -> None:
        self.host, self.slots, self.route, self.scopes = host, slots, route, scopes
        self.where = f"'{path}'" if path else f"the {type(host).__name__}"
        self.outputs: dict[str, tuple[OutputAdapter, ...]] = {}
        # What acts before the host or on its weights cannot act on some rows of one call.
        apart: list[str] = []
        for name in names:
            kinds = slots.of(name)
            if kinds.before or kinds.around or kinds.weights:
                apart.append(name)
            elif kinds.after:
                self.outputs[name] = kinds.after
        self.apart = frozenset(apart)
        self.forms = _forms(self.outputs)
        self.one_by_one = [name for name in self.outputs if not any(name in names for names, _ in self.forms)]
        self.layer = getattr(host, "layer_idx", None)
        self.whole = Kinds(after=(self.act,))
        self.idle = Kinds(by_row=self) if apart else Kinds(after=(self.act,) if self.outputs else ())
        self.order = argument_names(host) if apart else ()
        if apart:
            slots.hold_forward(host)

    def act(self, x: Any, y: Any) -> Any:
        """Let each adapter act on its rows of the host's output ``y``."""
        rows = self._rows()
        if len(rows.present) == 1:
            for adapter in self.outputs.get(rows.names[0] or "", ()):
                y = adapter(x, y)
            return y
        if rows.present.isdisjoint(self.outputs):
            return y
        rows = self.route.of(rows, self.where, (x, y))
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

    def __call__(self, forward: HostForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the host's ``forward``: run it for each adapter that acts inside, and once for all the others."""
        whole = self._rows()
        rows = whole if len(whole.present) == 1 else self.route.of(whole, self.where, (args, kwargs))
        groups = rows.split(self.apart)
        if len(groups) == 1:
            return self._run(forward, groups[0], args, kwargs)
        recurrent = isinstance(self.host, nn.RNNBase)
        if recurrent:
            args, kwargs = _swap_state(args, kwargs)
        parts, calls = [], []
        for group in groups:
            own = tuple(group.of(value, self._argument(i), self.layer) for i, value in enumerate(args))
            named = {key: group.of(value, key, self.layer) for key, value in kwargs.items()}
            calls.append((*own, *named.values()))
            output = self._run(forward, group, *(_swap_state(own, named) if recurrent else (own, named)))
            parts.append((output[0], swapped(output[1])) if recurrent else output)
        # A cache is handed on by reference, so the joined one has to be the caller's object.
        for cache, *caches in zip((*args, *kwargs.values()), *calls, strict=True):
            if is_cache(cache):
                vars(cache).update(vars(joined_cache(caches, groups, self.where)))
        output = joined(parts, groups, self.where)
        return (output[0], swapped(output[1])) if recurrent else output

    def _run(self, forward: HostForward, group: Group, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the host on the rows of ``group`` alone: with its adapter, or else with the adapters of the output."""
        outer = self.scopes.current()
        names = () if outer is None else outer.names
        scope = Scope(names, self.route, group.assignment, at=(self.slots, group.name))
        self.scopes.enter(scope)
        try:
            args, kwargs = self.slots.before(self.host, args, kwargs)
            return self.slots.after(self.host, args, kwargs, forward.run(args, kwargs))
        finally:
            self.scopes.leave(scope)

    def _rows(self) -> Assignment:
        """The part of the batch that is being computed."""
        scope = self.scopes.current()
        rows: Assignment = self.route.rows if scope is None else scope.rows
        return rows

    def _argument(self, place: int) -> str:
        return self.order[place] if place < len(self.order) else ""


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
