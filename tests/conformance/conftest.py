"""The contract of DESIGN section 4: every method × every kind of host.

A method is found by being a subclass of ``Method``, so a new one is tested without a line here.
"""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from conformance.cells import Cell
from conformance.hosts import HOSTS

from lightning_peft.core.method import registered_methods


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    compiles = "compiled_cell" in metafunc.fixturenames
    if "cell" in metafunc.fixturenames:
        # Where a method does not apply there is nothing to test but its refusal: those are cells of their own.
        chosen = [cell for cell in _cells() if not cell.refusal]
    elif "refused_cell" in metafunc.fixturenames:
        chosen = [cell for cell in _cells() if cell.refusal]
    else:
        return
    cells = [
        pytest.param(
            (cell.host, type(cell.method)),
            id=f"{type(cell.method).__name__}-{cell.host.name}",
            marks=[pytest.mark.slow] if compiles and cell.host.slow_to_compile else [],
        )
        for cell in chosen
    ]
    metafunc.parametrize("cell" if "cell" in metafunc.fixturenames else "refused_cell", cells, indirect=True)


@cache
def _cells() -> list[Cell]:
    # Methods that other tests define for their own ends are no part of the library.
    methods = [method for method in registered_methods() if method.__module__.startswith("lightning_peft.")]
    return [Cell(host, method) for method in methods for host in HOSTS]


@pytest.fixture
def compiled_cell(cell: Cell) -> Iterator[Cell]:
    """A cell for a test that compiles."""
    torch._dynamo.reset()
    yield cell
    torch._dynamo.reset()


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Cell:
    cell = Cell(*request.param)
    cell.host.example()  # the first time, it seeds: now, and not between two runs that a test compares
    return cell


@pytest.fixture
def refused_cell(request: pytest.FixtureRequest) -> Cell:
    return Cell(*request.param)
