"""Every method × every kind of model, trained by a real Trainer, saved and loaded; and the README's table of it."""

from pathlib import Path

import pytest
from conformance.matrix import BEGIN, README, REFUSED, WORKS, library_methods, read_table, run_cell, short_name
from conformance.models import MODELS

from lightning_peft.core.method import Method


# Torch's encoder packs padded rows into one in eval mode.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=pytest.mark.soak if model.soak else pytest.mark.compat)
        for name, model in MODELS.items()
    ],
)
@pytest.mark.parametrize("method", library_methods(), ids=short_name)
def test_a_method_trains_saves_and_loads_or_says_why_not(method: type[Method], model: str, tmp_path: Path) -> None:
    outcome = run_cell(method, MODELS[model], tmp_path)
    told = _told().get((short_name(method), model), outcome.mark)  # a new method is in no table yet
    assert outcome.mark == told, f"the README says {told}, and now: {outcome.reason or outcome.mark}"
    if outcome.mark == REFUSED:
        pytest.skip(outcome.reason)


def _told() -> dict[tuple[str, str], str]:
    """What the README's table says of each method and model."""
    heads, *rows = list(read_table(README.read_text())) or [[]]
    return {(head, row[0]): cell.split()[0] for row in rows for head, cell in zip(heads[1:], row[1:], strict=True)}


def test_the_readmes_table_is_of_methods_and_models_that_there_are() -> None:
    """A new method is in it once ``make matrix`` has run."""
    if BEGIN not in (readme := README.read_text()):
        pytest.skip(f"the README has no {BEGIN}")
    heads, *rows = list(read_table(readme)) or [[]]
    assert len(heads) > 12
    assert set(heads[1:]) <= {short_name(method) for method in library_methods()}
    assert [row[0] for row in rows] == list(MODELS)
    assert {cell.split()[0] for row in rows for cell in row[1:]} <= {WORKS, REFUSED}
