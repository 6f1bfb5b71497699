"""What acted when a node of autograd's graph was made, for a backward pass that computes its forward again.

Gradient checkpointing does so, often outside of the block that the forward ran in, and on another thread. Autograd
numbers the nodes of each thread, so each thread notes from which number on which scope decided. A node does not say
which thread has made it: what a whole forward puts out does, once a backward pass goes through that.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_peft.errors import AdapterNameError

S = TypeVar("S")
graph_task = torch._C._current_graph_task_id
"""The number of the backward pass that runs now; -1 outside of any."""
_next_number = torch._C._autograd._get_sequence_nr
_KEPT = 2**12  # changes that one thread's past keeps
_PASSES = 2**6  # backward passes that are remembered: those that run at the same time, and some that are over


class Past(Generic[S]):
    """What acted on one thread, by the numbers of the nodes that it made meanwhile."""

    def __init__(self) -> None:
        self.changes: list[tuple[int, S | None]] = [(-1, None)]
        self._version, self._since, self._exactly = -1, -1, False

    def note(self, scope: S | None) -> None:
        """Note that nodes which this thread makes from now on belong to forwards in ``scope``."""
        if self.changes[-1][0] == (number := _next_number()):  # no node since, as always where nothing trains
            self.changes.pop()
        if self.changes[-1][1] is not scope:
            self.changes.append((number, scope))
            del self.changes[:-_KEPT]

    def note_version(self, version: int, exactly: bool) -> None:
        """Note which version of what acts by default this thread sees: ``exactly`` from now on, or before already."""
        self._version, self._since, self._exactly = version, _next_number(), exactly

    def scope(self, number: int) -> S | None:
        """The scope in which the node ``number`` of this thread was made; None outside of any.

        Raises:
            AdapterNameError: that is too long ago.
        """
        place = bisect_right(self.changes, number, key=_first) - 1
        if place < 0:
            raise AdapterNameError(
                "A backward pass computes a forward again, and too many blocks of adapters were entered since: call "
                "backward earlier."
            )
        return self.changes[place][1]

    def is_of(self, version: int, number: int) -> bool:
        """True unless the node ``number`` of this thread is older than ``version`` of what acts by default."""
        return self._version == version and (number >= self._since or not self._exactly)


class Pasts(Generic[S]):
    """The pasts of all threads that have run one model."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._by_thread: dict[int, Past[S]] = {}
        self._met: dict[int, set[Past[S]]] = {}  # by backward pass: those whose forwards it goes through

    def own(self) -> Past[S]:
        """The past of the running thread."""
        past: Past[S] | None = getattr(self._own, "past", None)
        if past is None:
            past = self._own.past = self._by_thread[threading.get_ident()] = Past()
        return past

    def scopes(self) -> Iterator[S]:
        """Each scope in which forwards have run that may be computed again."""
        for past in list(self._by_thread.values()):
            yield from (scope for _, scope in list(past.changes) if scope is not None)

    def sign(self, output: Any) -> None:
        """Let backward passes through ``output``, of a whole forward, know that this thread has made it."""
        past = self.own()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda gradients: self._meet(past))

    def scope_of(self, node: Any, version: int) -> S | None:
        """The scope of the forward that the running backward pass computes again for ``node``.

        Args:
            node: of autograd's graph, the one that runs now.
            version: of what acts by default now.

        Raises:
            AdapterNameError: what acted in it cannot be told.
        """
        number = node._sequence_nr()
        # Where no whole forward has told: a backward on the CPU runs on the thread of its forward, on a GPU on one that
        # runs nothing else.
        own: Past[S] | None = getattr(self._own, "past", None)
        among = self._met.get(graph_task()) or ([own] if own is not None else list(self._by_thread.values()))
        found = {past.scope(number) for past in among}
        if len(found) > 1:
            raise AdapterNameError(
                "A backward pass computes a forward again, and several threads had made different adapters act. Call "
                "backward on the thread of the forward, once for the forwards of each thread."
            )
        scope = found.pop() if found else None
        if scope is None and among and not any(past.is_of(version, number) for past in among):
            raise AdapterNameError(
                "A backward pass computes a forward again (gradient checkpointing), and other adapters were activated "
                "since. Call backward before activate, or use the block: with active(model, name)."
            )
        return scope

    def _meet(self, past: Past[S]) -> None:
        if (task := graph_task()) not in self._met:
            self._met[task] = set()
            for old in list(self._met)[:-_PASSES]:
                self._met.pop(old, None)
        self._met[task].add(past)


def _first(entry: tuple[int, Any]) -> int:
    return entry[0]
