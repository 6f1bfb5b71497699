"""The contract of DESIGN section 4: every method × every kind of host.

A method is found by being a subclass of ``Method``, so a new one is tested without a line here.
"""

from collections.abc import Iterator

import pytest
import torch
from conformance.cells import Cell
from conformance.hosts import HOSTS

from lightning_peft.core.method import registered_methods


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        # Methods that other tests define for their own ends are no part of the library.
        methods = [method for method in registered_methods() if method.__module__.startswith("lightning_peft.")]
        compiles = "compiled_cell" in metafunc.fixturenames
        cells = [
            pytest.param(
                (host, method),
                id=f"{method.__name__}-{host.name}",
                marks=[pytest.mark.slow] if compiles and host.slow_to_compile else [],
            )
            for method in methods
            for host in HOSTS
        ]
        metafunc.parametrize("cell", cells, indirect=True)


@pytest.fixture
def compiled_cell(cell: Cell) -> Iterator[Cell]:
    """A cell for a test that compiles."""
    torch._dynamo.reset()
    yield cell
    torch._dynamo.reset()


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Cell:
    return Cell(*request.param)
