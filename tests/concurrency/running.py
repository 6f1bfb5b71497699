"""Code that runs at once: on threads that change places as often as Python lets them, or in tasks of one loop."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

Block = Callable[[], AbstractContextManager[None]]


@contextmanager
def switching_every(seconds: float | None) -> Iterator[None]:
    """Within the ``with`` block threads change places after ``seconds``; None for Python's own interval."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before if seconds is None else seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(jobs: Sequence[Callable[[], None]], interval: float | None = 1e-6) -> None:
    """Run each of ``jobs`` on a thread of its own, all at once, and raise what one of them has raised."""
    start, errors = threading.Barrier(len(jobs)), []

    def run(job: Callable[[], None]) -> None:
        start.wait()
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    with switching_every(interval):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def together_in_tasks(jobs: Sequence[tuple[Block, Callable[[], None]]], times: int) -> None:
    """Run each job ``times`` within its block, in a task of its own; the tasks take turns within their blocks."""

    async def run(block: Block, job: Callable[[], None]) -> None:
        for _ in range(times):
            with block():
                await asyncio.sleep(0)
                job()
                await asyncio.sleep(0)
                job()
            await asyncio.sleep(0)

    async def all_at_once() -> None:
        await asyncio.gather(*(run(block, job) for block, job in jobs))

    asyncio.run(all_at_once())


def repeatedly(run: Callable[[], Tensor], expected: Tensor, times: int, block: Block) -> Callable[[], None]:
    """A job: ``times`` forwards within ``block``, each of which has to give ``expected``."""

    def job() -> None:
        with torch.no_grad():  # a mode of the thread
            for _ in range(times):
                with block():
                    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-5)

    return job
