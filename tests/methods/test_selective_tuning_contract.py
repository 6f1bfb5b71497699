"""The contract of every method, for what selective tuning does with single entries and rows.

``tests/conformance`` has it for whole parameters, which is what the method does when only layers are named.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from conformance import test_copies, test_engine, test_training, test_undoing
from conformance.cells import Cell
from conformance.hosts import HOSTS

from lightning_peft import SelectiveTuning

CONTRACT = {
    name: test
    for module in (test_training, test_undoing, test_copies, test_engine)
    for name, test in vars(module).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["cell"]
}
CASES = {
    # on hosts of tests/conformance/hosts.py
    "entries-llama": {"density": 0.3, "parameter_types": ["weight"]},
    "entries-conv2d_groups": {"density": 0.3},
    "entries-attention_kdim": {"density": 0.3},
    "slices-attention_kdim": {"parameter_types": ["bias"], "target_modules": ["q_proj", "v_proj"]},
    "rows-llama": {"token_ids": [1, 2, 9]},
    "rows-embedding": {"token_ids": [0, 2, 10]},
}


def test_the_contract_is_found() -> None:
    assert len(CONTRACT) >= 24


@pytest.mark.parametrize("name", CONTRACT)
@pytest.mark.parametrize("case", CASES)
def test_it_holds(case: str, name: str) -> None:
    fields: dict[str, Any] = CASES[case]
    cell = Cell(next(host for host in HOSTS if host.name == case.partition("-")[2]), SelectiveTuning)
    cell.method = SelectiveTuning(**fields)
    test: Callable[[Cell], None] = CONTRACT[name]
    test(cell)
