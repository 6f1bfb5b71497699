"""Which adapters act for the code that is running: in this thread, and in this asyncio task.

A scope is entered by ``with active(...)`` and the like; a thread or task that has entered none sees what ``activate``
has set. A backward pass that computes a forward again sees what that saw.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from lightning_peft.errors import AdapterNameError
from lightning_peft.injection.recomputation import Pasts, graph_task

_entered: ContextVar[Mapping["Scopes", tuple["Scope", ...]] | None] = ContextVar("lightning_peft_scopes", default=None)
_is_compiling = torch.compiler.is_dynamo_compiling


@dataclass(eq=False)
class Scope:
    """One ``with`` block: the adapters that act in it, or, with a route, one of them on each row."""

    names: tuple[str, ...]
    route: Any = None
    rows: Any = None
    """With a route: the assignment of the rows that are being computed."""
    at: tuple[Any, str | None] | None = None
    """Where one host runs for the rows of one adapter: its slots, and the adapter's name."""
    task: int = -1
    """The backward pass in which it was entered; -1 outside of any."""
    outer: "Scope | None" = None
    """In compiled code: the block around this one."""


@dataclass(eq=False)
class Fold:
    """An adapter that is folded into the base for a while."""

    name: str
    undo: Callable[[], None] = lambda: None
    """Puts the base back as it was."""
    left: bool = False
    """True if its block was left."""


class _Mirror(threading.local):
    """What :data:`_entered` says, for compiled code, which cannot read a context variable but guards on this.

    A dictionary: compiled code silently loses what hooks assign to attributes of a ``threading.local``.
    """

    version = -1
    """The version of what acts by default that this thread has seen."""

    def __init__(self) -> None:  # in each thread that comes
        self.now: dict[str, Any] = {}


class Scopes:
    """The scopes of one model. A copy of the model has its own."""

    folded: tuple[str, ...] = ()
    """Adapters that are folded into the base for a while: they act for everybody, and not as adapters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # not on the way of a forward
        self._folds: list[Fold] = []
        self._folder: tuple[int, int] | None = None  # the task that has folded them in
        self._open: set[Scope] = set()  # the blocks that are open anywhere
        self._mirror = _Mirror()
        self._pasts: Pasts[Scope] = Pasts()
        self._version = 0  # how often what acts by default has changed

    def __reduce__(self) -> Any:
        return Scopes, ()

    def current(self) -> Scope | None:
        """The scope of the code that is running; None where those adapters act that ``activate`` has set.

        Raises:
            AdapterNameError: a backward pass computes a forward again, and what acted in that cannot be told.
        """
        if _is_compiling():
            if self._mirror.now.get("shared"):
                raise AdapterNameError("Compiled code cannot tell the scopes of tasks apart: await nothing in a scope.")
            found: Scope | None = self._mirror.now.get("scope")
            return found
        scopes = _entered.get()
        entered = scopes.get(self) if scopes else None
        scope = entered[-1] if entered else None
        # Outside of a backward pass, what runs now is what was called now.
        if (task := graph_task()) == -1:
            if self._mirror.version != self._version:
                self._see_version(exactly=False)
            return scope
        entered_in_it = scope is not None and scope.task == task
        node: Any = None if entered_in_it else torch._C._current_autograd_node()
        # No node runs in a callback of autograd's, where nothing is computed again.
        return scope if node is None else self._pasts.scope_of(node, self._version)

    def enter(self, scope: Scope) -> None:
        """Let ``scope`` decide from now on, in this thread and task.

        Raises:
            AdapterNameError: an adapter is folded into the base now.
        """
        if _is_compiling():
            scope.outer = self._mirror.now.get("scope")
            self._mirror.now["scope"] = scope
            return
        if scope.at is None:
            with self._lock:
                self.check_unfolded()
                self._open.add(scope)
        scope.task = graph_task()
        self._change((*self._blocks(), scope), added=(scope,))

    def leave(self, scope: Scope) -> None:
        """Let ``scope`` decide no longer, whichever were entered after it."""
        if _is_compiling():
            self._mirror.now["scope"] = scope.outer
            return
        with self._lock:
            self._open.discard(scope)
        entered = tuple(other for other in self._blocks() if other is not scope)
        self._change(entered, left=(scope,))

    def fold(self, name: str) -> Fold:
        """Note that the base is to have the adapter ``name`` in it, for everybody.

        Raises:
            AdapterNameError: other threads or tasks have folded one in, or are in blocks of their own.
        """
        task = running_task()
        with self._lock:
            if self._folds and self._folder != task:
                self.check_unfolded()
            if name in self.folded:
                raise AdapterNameError(f"The adapter {name!r} is folded into the base already.")
            if not self._open <= set(self._blocks()):
                raise AdapterNameError(
                    f"{name!r} cannot be folded into the base now: other threads or tasks are within active(...), "
                    "disabled(...) or route(...), and would see the base change. Wait for them."
                )
            # Under the lock, as blocks are entered: none comes between this and the first weight that is written.
            self._folder = task
            self._folds.append(Fold(name))
            self.folded = tuple(fold.name for fold in self._folds)
            return self._folds[-1]

    def unfold(self, fold: Fold) -> None:
        """Take an adapter out of the base, as soon as none is left that was folded in after it."""
        with self._lock:
            fold.left = True
            while self._folds and self._folds[-1].left:
                self._folds[-1].undo()
                self._folds.pop()
            self.folded = tuple(fold.name for fold in self._folds)

    def rename(self, old: str, new: str) -> None:
        """Call an adapter by another name in all blocks, those too whose forwards may be computed again."""
        for scope in {*self._open, *self._pasts.scopes()}:
            scope.names = tuple(new if name == old else name for name in scope.names)

    def check_unfolded(self) -> None:
        """Raise if an adapter is folded into the base for a while.

        Raises:
            AdapterNameError: one is.
        """
        if self.folded:
            raise AdapterNameError(
                f"The adapter {self.folded[0]!r} is folded into the base now, for all threads and tasks: leave the "
                "merged(...) block first."
            )

    def default_changes(self) -> None:
        """Note that other adapters act by default from now on: earlier forwards cannot be computed again."""
        self._version += 1
        self._see_version(exactly=True)

    def begin_forward(self) -> None:
        """Note, at the start of a whole forward, that all its nodes are of what acts now."""
        if graph_task() == -1:
            # Tasks take turns on a thread, and a context is handed on to others, without a block that is entered.
            self._pasts.own().note(self.current())
            if self._mirror.version != self._version:
                self._see_version(exactly=True)

    def end_forward(self, output: Any) -> None:
        """Note, at the end of a whole forward, which thread it ran on."""
        if torch.is_grad_enabled() and graph_task() == -1:
            self._pasts.sign(output)

    def _see_version(self, exactly: bool) -> None:
        self._mirror.version = self._version
        self._pasts.own().note_version(self._version, exactly)

    def _blocks(self) -> tuple[Scope, ...]:
        return (_entered.get() or {}).get(self, ())

    def _change(self, entered: tuple[Scope, ...], added: tuple[Scope, ...] = (), left: tuple[Scope, ...] = ()) -> None:
        scopes = {**(_entered.get() or {}), self: entered}
        if not entered:
            del scopes[self]
        _entered.set(scopes)
        now, scope = self._mirror.now, entered[-1] if entered else None
        open_here = [*(other for other in now.get("open", ()) if other not in left), *added]
        if graph_task() == -1:  # what is computed again is not what is asked for
            self._pasts.own().note(scope)
        # Blocks of other tasks are open on this thread: which of them is running, compiled code cannot ask.
        now.update(scope=scope, open=open_here, shared=any(other not in entered for other in open_here))


def running_task() -> tuple[int, int]:
    """What tells the running thread and asyncio task from others."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs on this thread
        task = None
    return threading.get_ident(), id(task)
