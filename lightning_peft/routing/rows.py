"""Some rows of a batch, taken out of everything that a module is called with, and its outputs put together again.

What counts the rows is the first dimension. A tensor with a single row stands for all of them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_peft.core.adapter_index import AdapterIndex, made_once
from lightning_peft.errors import NotApplicableError
from lightning_peft.optional import check_hf_version
from lightning_peft.prompting.call import SHARED_BY_ROWS, is_cache

# Arguments of torch's and transformers' layers that speak of places in the text, not of rows, however many there are.
_SHARED = (*SHARED_BY_ROWS, "attn_mask", "mask", "src_mask", "tgt_mask", "memory_mask")
_T = TypeVar("_T")


class Assignment:
    """Which adapter each row of a batch gets; None for none."""

    def __init__(self, names: Sequence[str | None], lengths: set[int]) -> None:
        """Give the rows ``names``; ``lengths`` are how many places of a flattened tensor may belong to one row."""
        self.names, self.lengths = tuple(names), lengths
        self.present = frozenset(self.names)
        self._made: dict[Any, Any] = {}  # indices are wanted again in every layer

    def __len__(self) -> int:
        return len(self.names)

    def repeated(self, times: int) -> "Assignment":
        """Assignment for a batch whose rows are each repeated ``times`` times."""
        return self._once(times, lambda: Assignment([n for n in self.names for _ in range(times)], self.lengths))

    def split(self, apart: frozenset[str]) -> "list[Group]":
        """The rows of each adapter of ``apart``, and all others together."""

        def make() -> list[Group]:
            groups: dict[str | None, list[int]] = {}
            for row, name in enumerate(self.names):
                groups.setdefault(name if name in apart else None, []).append(row)
            return [Group(name, rows, self) for name, rows in groups.items()]

        return self._once(apart, make)

    def index(self, names: tuple[str, ...], device: torch.device) -> "AdapterIndex":
        """For each row the place of its adapter in ``names``, ``len(names)`` where it is none of these."""

        def make() -> AdapterIndex:
            place: dict[str | None, int] = {name: i for i, name in enumerate(names)}
            return AdapterIndex(_index([place.get(name, len(names)) for name in self.names], device))

        return self._once((names, device), make)

    def _once(self, key: Any, make: Callable[[], _T]) -> _T:
        return made_once(self._made, key, make)


class Group:
    """Some rows of a batch: the rows of the adapter ``name``; if that is None, the rows left over."""

    def __init__(self, name: str | None, rows: Sequence[int], batch: Assignment) -> None:
        self.name, self.rows, self.total, self.lengths = name, list(rows), len(batch), batch.lengths
        self.assignment = Assignment([batch.names[row] for row in rows], batch.lengths)
        self._made: dict[Any, Any] = {}

    def index(self, width: int, device: torch.device) -> Tensor:
        """The places of the rows in a tensor with ``width`` of them for each row."""
        return made_once(
            self._made,
            (width, device),
            lambda: _index([r * width + i for r in self.rows for i in range(width)], device),
        )

    def order(self, groups: "Sequence[Group]", width: int, device: torch.device) -> Tensor | None:
        """Where each place of the batch is in ``groups``, one after the other; None where it is there already."""

        def make() -> Tensor | None:
            places = [row * width + i for group in groups for row in group.rows for i in range(width)]
            order = sorted(range(len(places)), key=places.__getitem__)
            return None if places == sorted(places) else _index(order, device)

        return made_once(self._made, ("order", width, device), make)

    def of(self, value: Any, name: str = "", layer: int | None = None) -> Any:
        """The rows of ``value``: a tensor, a container of them, or a cache of transformers; others stay as they are.

        Args:
            value: what a module is called with, or has put out.
            name: the argument's.
            layer: the one layer of a cache that is read; None for all.
        """
        if isinstance(value, Tensor):
            return self._of_tensor(value, name)
        if isinstance(value, dict):
            return _like(value, {key: self.of(item, str(key), layer) for key, item in value.items()})
        if isinstance(value, (tuple, list)):
            return _like(value, [self.of(item, name, layer) for item in value])
        if is_cache(value):
            check_hf_version()
            return _with(value, {key: self._of_state(key, item, layer) for key, item in vars(value).items()})
        return value

    def _of_tensor(self, x: Tensor, name: str) -> Tensor:
        size = len(x) if x.dim() else 0
        if size in (0, 1) or (name in _SHARED and x.dim() < 3):
            return x
        width, rest = divmod(size, self.total)
        known = width == 1 or width in self.lengths or name in _SHARED  # masks of attentions: one for each head
        return x if rest or not known else x.index_select(0, self.index(width, x.device))

    def _of_state(self, name: str, value: Any, layer: int | None) -> Any:
        if name == "layers" and layer is not None:
            return [self.of(item) if i == layer else item for i, item in enumerate(value)]
        return self.of(value, name, layer)


def joined(parts: Sequence[Any], groups: Sequence[Group], where: str) -> Any:
    """What the calls with the rows of ``groups``, which are all rows, have put out, in the order of the batch.

    Raises:
        NotApplicableError: the parts have different shapes, or one of them does not belong to rows (a loss).
    """
    first = parts[0]
    if all(part is first for part in parts):  # nothing has touched it
        return first
    if len({type(part) for part in parts}) > 1:
        raise _unlike(where, parts)
    if isinstance(first, Tensor):
        return _join_tensors(parts, groups, where)
    if isinstance(first, dict):
        if any(part.keys() != first.keys() for part in parts):
            raise _unlike(where, parts)
        return _like(first, {key: joined([p[key] for p in parts], groups, where) for key in first})
    if isinstance(first, (tuple, list)):
        if any(len(part) != len(first) for part in parts):
            raise _unlike(where, parts)
        return _like(first, [joined(items, groups, where) for items in zip(*parts, strict=True)])
    # A cache that cannot be joined is an error only for whoever asks for it: many callers never do.
    if is_cache(first):
        try:
            return joined_cache(parts, groups, where)
        except NotApplicableError as error:
            return LostCache(str(error))
    if isinstance(first, (bool, int, float, str)) and any(part != first for part in parts):
        raise _unlike(where, parts)
    return first


def joined_cache(parts: Sequence[Any], groups: Sequence[Group], where: str) -> Any:
    """As :func:`joined`, of caches."""
    keys = vars(parts[0])
    try:
        return _with(parts[0], {key: _joined_state([vars(p)[key] for p in parts], groups, where) for key in keys})
    except _UnlikeError as error:
        raise NotApplicableError(
            f"There is no cache of a batch whose rows have {', '.join(map(str, error.lengths))} tokens in it, virtual "
            "ones included: use use_cache=False, or prompts of one length in all rows."
        ) from error


def _joined_state(parts: Sequence[Any], groups: Sequence[Group], where: str) -> Any:
    if all(part is parts[0] for part in parts):  # a layer that was not read
        return parts[0]
    if isinstance(parts[0], Tensor) and not parts[0].dim():  # a count
        return parts[0]
    if is_cache(parts[0]):
        return joined_cache(parts, groups, where)
    if isinstance(parts[0], list):
        return [_joined_state(items, groups, where) for items in zip(*parts, strict=True)]
    return joined(parts, groups, where)


class LostCache:
    """In place of a cache that cannot be put together: whatever is asked of it, it says why."""

    def __init__(self, reason: str) -> None:
        self.__dict__["reason"] = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what pickle and copy look for
            raise AttributeError(name)
        raise NotApplicableError(self.reason)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of ``value``, in order; those without dimensions are left out."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def swapped(states: Any) -> Any:
    """The states of a recurrent layer with their first two dimensions swapped: the second one counts the rows."""
    if isinstance(states, tuple):
        return tuple(state.transpose(0, 1) for state in states)
    return states.transpose(0, 1) if isinstance(states, Tensor) else states


def _join_tensors(parts: Sequence[Tensor], groups: Sequence[Group], where: str) -> Tensor:
    sizes = [(len(part) if part.dim() else 0, len(group.rows)) for part, group in zip(parts, groups, strict=True)]
    widths = {size / rows for size, rows in sizes}
    if all(size == 0 for size, _ in sizes):
        if parts[0].numel() == 0:
            return parts[0]
        raise NotApplicableError(
            f"The rows of {where} run by adapter here, and it puts out one number for all of them, such as a loss. "
            "Compute that outside of the model, from its output for each row (no labels in the call)."
        )
    if len(widths) > 1 and all(size == 1 for size, _ in sizes):  # one row that stands for all
        parts = [part.expand(rows, *part.shape[1:]) for part, (_, rows) in zip(parts, sizes, strict=True)]
        widths = {1.0}
    if len(widths) > 1 or not (width := widths.pop()).is_integer() or len({part.shape[1:] for part in parts}) > 1:
        raise _unlike(where, parts)
    whole = torch.cat(list(parts))
    order = groups[0].order(groups, int(width), whole.device)
    return whole if order is None else whole.index_select(0, order)


class _UnlikeError(NotApplicableError):
    lengths: tuple[int, ...] = ()


def _unlike(where: str, parts: Sequence[Any]) -> NotApplicableError:
    shown = ", ".join(str(tuple(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
    error = _UnlikeError(
        f"The rows of {where} run by adapter here, and what that gives does not fit together: {shown}."
    )
    error.lengths = tuple(p.shape[-2] for p in parts if isinstance(p, Tensor) and p.dim() > 1)
    return error


def _like(value: Any, items: Any) -> Any:
    """A container of the type of ``value`` with other items."""
    if isinstance(value, dict):
        return items if type(value) is dict else type(value)(**items)
    return type(value)(*items) if hasattr(value, "_make") else type(value)(items)  # a named tuple takes them one by one


def _with(value: Any, attributes: dict[str, Any]) -> Any:
    made = copy.copy(value)
    vars(made).update(attributes)
    return made


def _index(places: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)
