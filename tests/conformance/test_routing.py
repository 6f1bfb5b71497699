"""Rows of one batch on adapters of their own: what a mixed batch gives is what each adapter gives alone."""

import pytest
import torch
from conformance.cells import Cell
from perturbation import perturb
from torch import Tensor

from lightning_peft import LoRA, active, disabled, inject, route
from lightning_peft.core.method import Method
from lightning_peft.errors import NotApplicableError, TargetError


def test_a_mixed_batch_equals_each_adapter_alone(cell: Cell) -> None:
    """Two adapters of the method, one of LoRA where it applies, and the bare base."""
    model = cell.trained(name="a").eval()
    names: list[str | None] = ["a", None]
    for name, method in (("b", cell.method), ("lora", _lora(cell))):
        try:
            inject(model, method, name)
        except (NotApplicableError, TargetError):
            continue
        perturb(model, name, 0.05)
        names.insert(1, name)
    names = [names[i % len(names)] for i in (0, 3, 1, 2, 0)]
    model.eval()
    args, kwargs = cell.host.example()
    batch = [_rows(x, len(names)) for x in args], {key: _rows(x, len(names)) for key, x in kwargs.items()}
    if getattr(model, "batch_first", True) is False:
        with (
            pytest.raises(NotApplicableError, match="the first dimension does not count the rows"),
            route(model, names),
        ):
            pytest.fail("rows cannot be told")
        return
    with route(model, names):
        found = _output(model(*batch[0], **batch[1]))
    expected = []
    for row, name in enumerate(names):
        with active(model, name) if name else disabled(model):
            one = [x[row : row + 1] for x in batch[0]], {key: x[row : row + 1] for key, x in batch[1].items()}
            expected.append(_output(model(*one[0], **one[1])))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-5)


def _lora(cell: Cell) -> Method:
    return LoRA(r=2, target_modules=list(cell.host.targets), modules_to_save=None)


def _rows(x: Tensor, rows: int) -> Tensor:
    """The example with ``rows`` rows, of which no two are the same."""
    x = x[torch.arange(rows) % len(x)]
    return x + 0.1 * torch.randn_like(x) if x.is_floating_point() else x


def _output(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
