"""One model, several threads: each gets the answer that it would get alone, and the base stays as it is."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

import pytest
import torch
from concurrency.running import repeatedly, together
from conformance.cells import Cell, perturb
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import activate, active, disabled, inject, merged, remove, route
from lightning_peft.errors import AdapterNameError, NotMergeableError

Load = tuple[int, float | None, int]
"""Threads, how often they change places (seconds, None for Python's own interval), and forwards of each."""
NAMES = ("a", "b", None)


class Served:
    """A model with two adapters, inputs for it, and what each adapter makes of each input when it runs alone."""

    def __init__(self, cell: Cell) -> None:
        self.base = Snapshot(model := cell.base().eval())
        for name in ("a", "b"):
            inject(model, cell.method, name)
            perturb(model, name)
        activate(model, "a")
        self.cell, self.model = cell, model.eval()
        args, kwargs = cell.host.example()
        self.inputs = [
            ([_varied(x, i) for x in args], {key: _varied(x, i) for key, x in kwargs.items()}) for i in range(4)
        ]
        self.rows = next(len(x) for x in (*args, *kwargs.values()))
        with torch.no_grad():
            self.expected = {(name, i): self._alone(name, i) for name in NAMES for i in range(4)}

    def run(self, i: int) -> Tensor:
        """The output for one of the inputs."""
        args, kwargs = self.inputs[i % 4]
        output = self.model(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def job(self, i: int, name: str | None, times: int, block: Callable[[], AbstractContextManager[None]]) -> partial:
        """Forwards with the adapter ``name`` that has to act within ``block``."""
        return partial(repeatedly(partial(self.run, i), self.expected[name, i % 4], times, block))

    def within(self, name: str | None) -> Callable[[], AbstractContextManager[None]]:
        """A block in which the adapter ``name`` acts."""
        return partial(active, self.model, name) if name else partial(disabled, self.model)

    def assert_base_untouched(self) -> None:
        """Fail unless, without its adapters, the model is what it was."""
        for name in ("a", "b"):
            remove(self.model, name)
        self.base.assert_same(self.model)

    def _alone(self, name: str | None, i: int) -> Tensor:
        with self.within(name)():
            return self.run(i)


def _varied(x: Tensor, i: int) -> Tensor:
    """The same shape with other content: rows turned, and numbers scaled."""
    return (1 + i / 4) * x.roll(i, 0) if x.is_floating_point() else x.roll(i, 0)


@pytest.fixture
def served(cell: Cell) -> Iterator[Served]:
    served = Served(cell)
    assert not torch.equal(served.expected["a", 0], served.expected["b", 0])  # else a mix-up would go unseen
    yield served
    served.assert_base_untouched()


def test_all_threads_use_the_active_adapter(served: Served, load: Load) -> None:
    threads, interval, times = load
    together([served.job(i, "a", times, nullcontext) for i in range(threads)], interval)


def test_each_thread_has_an_adapter_of_its_own(served: Served, load: Load) -> None:
    threads, interval, times = load
    names = [NAMES[i % 3] for i in range(threads)]
    together([served.job(i, name, times, served.within(name)) for i, name in enumerate(names)], interval)


def test_scopes_do_not_see_what_another_thread_activates(served: Served, load: Load) -> None:
    threads, interval, times = load

    def switch() -> None:
        for _ in range(times):
            activate(served.model, "b")
            activate(served.model, "a", "b")
            activate(served.model)
        activate(served.model, "a")

    names = [NAMES[i % 3] for i in range(threads)]
    jobs = [served.job(i, name, times, served.within(name)) for i, name in enumerate(names)]
    together([*jobs, switch], interval)


def test_each_thread_routes_its_own_batch(served: Served, load: Load) -> None:
    if any(getattr(module, "batch_first", True) is False for module in served.model.modules()):
        pytest.skip("rows cannot be told: route refuses, which tests/routing holds")
    threads, interval, times = load
    jobs = []
    for i in range(threads):
        names = [NAMES[(i + row) % 3] for row in range(served.rows)]
        with torch.no_grad(), route(served.model, names):
            expected = served.run(i)
        for row, name in enumerate(names):
            torch.testing.assert_close(expected[row], served.expected[name, i % 4][row], rtol=1e-4, atol=1e-4)
        jobs.append(repeatedly(partial(served.run, i), expected, times, partial(route, served.model, names)))
    together(jobs, interval)


def test_state_dicts_and_copies_are_taken_meanwhile(served: Served, load: Load) -> None:
    threads, interval, times = load
    before = {key: tensor.clone() for key, tensor in served.model.state_dict().items()}

    def read() -> None:
        for _ in range(times):
            state = served.model.state_dict()
            assert state.keys() == before.keys()
            assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())

    def duplicate() -> None:
        for _ in range(max(1, times // 6)):
            twin = copy.deepcopy(served.model)
            with torch.no_grad(), active(twin, "b"):
                torch.testing.assert_close(Served.run(_Twin(served, twin), 1), served.expected["b", 1])

    names = [NAMES[i % 3] for i in range(threads)]
    jobs = [served.job(i, name, times, served.within(name)) for i, name in enumerate(names)]
    together([*jobs, read, duplicate], interval)


def test_folding_in_and_blocks_of_others_keep_each_other_out(served: Served, load: Load) -> None:
    threads, interval, times = load

    def ask(i: int, name: str | None) -> None:
        left = times
        while left:
            with suppress(AdapterNameError):  # it is folded in now
                served.job(i, name, 1, served.within(name))()
                left -= 1
            time.sleep(0.001)

    def fold() -> None:
        for _ in range(times):
            with suppress(AdapterNameError, NotMergeableError), merged(served.model, "b"):
                pass
            time.sleep(0.001)

    together([*(partial(ask, i, NAMES[i % 3]) for i in range(threads)), fold], interval)
    with suppress(NotMergeableError), merged(served.model, "b"):  # when all are done
        assert not torch.equal(served.run(0), served.expected["a", 0])
    with served.within("a")(), torch.no_grad():
        torch.testing.assert_close(served.run(0), served.expected["a", 0])


class _Twin:
    """A copy of a served model with the same inputs."""

    def __init__(self, served: Served, model: nn.Module) -> None:
        self.inputs, self.model = served.inputs, model
