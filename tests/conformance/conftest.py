"""The contract of DESIGN section 4: every method × every kind of host.

A method is found by being a subclass of ``Method``, so a new one is tested without a line here. One of another package
is tested by `make contract METHOD=path/to/its_file.py`. What a method says that it cannot hold
(``Method.cannot_hold``), or a host (``Host.cannot_hold``), has to fail.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conformance.cells import Cell, cells, methods
from transformers import PreTrainedModel

# Where a method does not apply there is nothing to test but its refusal: those are cells of their own.
CHOICES: dict[str, Callable[[Cell], bool]] = {
    "cell": lambda cell: not cell.refusal,
    "transformers_cell": lambda cell: isinstance(cell.host.network(), PreTrainedModel) and not cell.refusal,
    "refused_cell": lambda cell: bool(cell.refusal),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    compiles = "compiled_cell" in metafunc.fixturenames
    for name in CHOICES.keys() & set(metafunc.fixturenames):
        params = [
            pytest.param(
                cell,
                id=f"{type(cell.method).__name__}-{cell.host.name}",
                marks=_marks(cell, compiles, metafunc.function.__name__),
            )
            for cell in cells()
            if CHOICES[name](cell)
        ]
        metafunc.parametrize(name, params, indirect=True)


def _marks(cell: Cell, compiles: bool, test: str) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.soak] if (not cell.host.compiled if compiles else cell.host.soak) else []
    reason = cell.method.cannot_hold.get(test) or cell.host.cannot_hold.get(test)
    return [*marks, pytest.mark.xfail(strict=True, reason=reason)] if reason else marks


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a method that says it cannot hold what is not asked."""
    names = {getattr(item, "originalname", item.name) for item in items if item.path.parent == Path(__file__).parent}
    for method in methods() if os.environ.get("METHOD") else ():
        if unknown := sorted(set(method.cannot_hold) - names):
            raise pytest.UsageError(f"{method.__name__}.cannot_hold names no test: {unknown[0]!r}.")


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
