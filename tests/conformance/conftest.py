"""The contract of DESIGN section 4: every method × every kind of host.

A method is found by being a subclass of ``Method``, so a new one is tested without a line here.
"""

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from conformance.cells import Cell
from conformance.hosts import HOSTS
from transformers import PreTrainedModel

from lightning_peft.core.method import registered_methods

# Where a method does not apply there is nothing to test but its refusal: those are cells of their own.
CHOICES: dict[str, Callable[[Cell], bool]] = {
    "cell": lambda cell: not cell.refusal,
    "transformers_cell": lambda cell: isinstance(cell.host.network(), PreTrainedModel) and not cell.refusal,
    "refused_cell": lambda cell: bool(cell.refusal),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    compiles = "compiled_cell" in metafunc.fixturenames
    for name in CHOICES.keys() & set(metafunc.fixturenames):
        cells = [
            pytest.param(
                cell,
                id=f"{type(cell.method).__name__}-{cell.host.name}",
                marks=[pytest.mark.soak] if (not cell.host.compiled if compiles else cell.host.soak) else [],
            )
            for cell in _cells()
            if CHOICES[name](cell)
        ]
        metafunc.parametrize(name, cells, indirect=True)


@cache
def _cells() -> list[Cell]:
    # Methods that other tests define for their own ends are no part of the library.
    methods = [method for method in registered_methods() if method.__module__.startswith("lightning_peft.")]
    return [Cell(host, method) for method in methods for host in HOSTS]


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Cell:
    cell: Cell = request.param
    cell.host.example()  # the first time, it seeds: now, and not between two runs that a test compares
    return cell


transformers_cell = refused_cell = cell


@pytest.fixture
def compiled_cell(cell: Cell) -> Iterator[Cell]:
    """A cell for a test that compiles."""
    torch._dynamo.reset()
    yield cell
    torch._dynamo.reset()
