"""One model, several tasks of one loop, which take turns within their blocks."""

from contextlib import nullcontext
from functools import partial

import torch
from concurrency.running import repeatedly, together_in_tasks
from concurrency.test_threads import NAMES, Served
from conformance.cells import Cell

from lightning_peft import activate


def test_each_task_has_an_adapter_of_its_own(cell: Cell) -> None:
    served = Served(cell)
    jobs = [
        (served.within(name), repeatedly(partial(served.run, i), served.expected[name, i], 1, nullcontext))
        for i, name in enumerate((*NAMES, "b"))
    ]
    together_in_tasks(jobs, times=3)
    with torch.no_grad():  # every block is left
        torch.testing.assert_close(served.run(0), served.expected["a", 0])
    activate(served.model)
    with torch.no_grad():
        torch.testing.assert_close(served.run(0), served.expected[None, 0])
    served.assert_base_untouched()
