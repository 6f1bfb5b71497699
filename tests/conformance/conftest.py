"""The contract of DESIGN section 4: every method × every kind of host.

A method is found by being a subclass of ``Method``, so a new one is tested without a line here. One of another package
is tested by `make contract METHOD=path/to/its_file.py`. What a method says that it cannot hold
(``Method.cannot_hold``) has to fail.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conformance.cells import Cell
from conformance.hosts import HOSTS
from transformers import PreTrainedModel

from lightning_peft.core.method import registered_methods

EXAMPLE = Path(__file__).parents[2] / "examples" / "first_method.py"
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
                marks=_marks(cell, compiles, metafunc.function.__name__),
            )
            for cell in _cells()
            if CHOICES[name](cell)
        ]
        metafunc.parametrize(name, cells, indirect=True)


def _marks(cell: Cell, compiles: bool, test: str) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.soak] if (not cell.host.compiled if compiles else cell.host.soak) else []
    reason = cell.method.cannot_hold.get(test)
    return [*marks, pytest.mark.xfail(strict=True, reason=reason)] if reason else marks


@cache
def _cells() -> list[Cell]:
    """The library's methods and the example's, or those of the one file that is asked for, on every host."""
    asked = os.environ.get("METHOD")
    own = _imported(Path(asked) if asked else EXAMPLE)
    rooms = (own.__name__,) if asked else (own.__name__, "lightning_peft.")
    # Methods that other tests define for their own ends are no part of the library.
    methods = [method for method in registered_methods() if method.__module__.startswith(rooms)]
    return [Cell(host, method) for method in methods for host in HOSTS]


def _imported(path: Path) -> ModuleType:
    name = f"method_in_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses and pickle look
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


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
