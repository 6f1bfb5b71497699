"""The README's table: every method × every kind of model, as it runs.

From ``tests/``, ``python -m conformance.matrix`` prints it, and ``--write`` puts it into the README.
"""

import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from conformance.models import MODELS, Model, Task
from snapshot import Snapshot
from torch.utils.data import DataLoader

from lightning_peft import PEFTCallback, load_from_checkpoint
from lightning_peft.components.modules_to_save import resolve_modules_to_save
from lightning_peft.core.method import Method, registered_methods
from lightning_peft.errors import NotApplicableError, PEFTError

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
WORKS, REFUSED, BROKEN = "✓", "–", "✗"
NAMED = "With layers named in target_modules"
STEPS = 30
# The papers' sizes are too large for layers 16 wide and for sequences of 6 tokens.
SIZES = {"r": 4, "reduction_factor": 4, "num_virtual_tokens": 4, "encoder_hidden_size": 16}


@dataclass(frozen=True)
class Outcome:
    """What became of one method on one model."""

    model: str
    method: str
    mark: str
    reason: str = ""
    """Why the method does not apply, or what failed."""


def library_methods() -> list[type[Method]]:
    """The library's own methods, by name; those that tests define for their own ends are no part of it."""
    own = [method for method in registered_methods() if method.__module__.startswith("lightning_peft.")]
    return sorted(own, key=lambda method: method.__name__.lower())


def short_name(method: type[Method]) -> str:
    """A method's name for the head of a narrow column."""
    return re.sub(r"(?<=..)(Tuning|Adapter)$", "", method.__name__)


def fitted(method: Method, model: Model) -> Method:
    """``method`` (and each method it is made of) as a user would set it for ``model``.

    Fields decide, never the class: sizes shrink (:data:`SIZES`); in a network of plain torch ``modules_to_save`` names
    its head; and a method that finds no layers by itself, or leaves their choice to the user, gets the model's own list
    as ``target_modules``, if it can do with that.
    """
    names = method.field_names()
    changes: dict[str, Any] = {name: size for name, size in SIZES.items() if name in names}
    if model.head and "modules_to_save" in names:
        changes["modules_to_save"] = [model.head]
    for f in fields(method):  # type: ignore[arg-type]
        value = getattr(method, f.name)
        if isinstance(value, (list, tuple)) and any(isinstance(item, Method) for item in value):
            changes[f.name] = type(value)(fitted(item, model) for item in value)
    method = replace(method, **changes)  # type: ignore[type-var]
    if "target_modules" in names and (refusal := _refusal(method, model)):
        pointed = replace(method, target_modules=list(model.targets))  # type: ignore[type-var]
        other = _refusal(pointed, model)
        # Where it finds no layers and cannot use those that there are, that is the reason to tell.
        told = isinstance(other, NotApplicableError) and not isinstance(refusal, NotApplicableError)
        return pointed if other is None or told else method
    return method


def _refusal(method: Method, model: Model) -> PEFTError | None:
    """Why ``method`` cannot be planned for ``model``; None if it can."""
    task = Task(model.name)
    try:
        method.plan(task, resolve_modules_to_save(task, method.modules_to_save))
    except PEFTError as error:
        return error
    return None


def run_cell(method: type[Method], model: Model, folder: Path) -> Outcome:
    """Train ``method`` on ``model`` under a real Trainer, save it, load it, and compare.

    Raises:
        AssertionError: the loss is not lower, something trained that should not, or the file does not give it back.
    """
    torch.manual_seed(0)
    task, batch = Task(model.name), model.example()
    untouched = Snapshot(task.network)
    steps, once = (DataLoader([batch] * times, batch_size=None) for times in (STEPS, 1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[PEFTCallback(chosen := fitted(method(), model), show=False)],
    )
    named = getattr(chosen, "target_modules", None) != getattr(method(), "target_modules", None)
    outcome = Outcome(model.name, short_name(method), WORKS, NAMED if named else "")
    refusal = None
    try:
        before = trainer.validate(task, once, verbose=False)[0]["loss"]
    except NotApplicableError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.strip(), "the refusal gives no reason"
        untouched.assert_same(task.network)
        return replace(outcome, mark=REFUSED, reason=refusal)
    fresh = {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}
    trainer.fit(task, steps, once)
    after = trainer.callback_metrics["loss"]

    assert after < before, f"the loss rose from {before} to {after}"
    still = [name for name, p in task.named_parameters() if p.requires_grad and torch.equal(p, fresh[name])]
    assert not still, f"training did not move {still}"
    state = task.network.state_dict()
    changed = [key for key, tensor in untouched.state.items() if not torch.equal(state[key], tensor)]
    assert not changed, f"training changed the base: {changed}"

    trainer.save_checkpoint(path := folder / "task.ckpt", weights_only=True)
    keys = torch.load(path, weights_only=True)["state_dict"].keys()
    foreign = [key for key in keys if ".peft." not in f".{key}"]
    assert keys, "the file holds no adapter"
    assert not foreign, f"the file holds more than the adapter: {foreign}"
    loaded = load_from_checkpoint(Task, path)
    with torch.no_grad():
        expected, found = (module.eval().predict_step(batch, 0) for module in (task, loaded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    return outcome


def run_all() -> list[Outcome]:
    """Every cell, those that fail included."""
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS.values():
            for method in library_methods():
                try:
                    outcomes.append(run_cell(method, model, Path(folder)))
                except Exception as error:
                    outcomes.append(Outcome(model.name, short_name(method), BROKEN, f"{type(error).__name__}: {error}"))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table; below it, why some methods do not apply."""
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    rows: dict[str, dict[str, str]] = {}
    notes: list[str] = []
    for outcome in outcomes:
        mark = outcome.mark
        if outcome.reason:
            note = brief(outcome)
            notes += [note] if note not in notes else []
            mark += f" <sup>{notes.index(note) + 1}</sup>"
        rows.setdefault(outcome.model, {})[outcome.method] = mark
    lines = [["", *methods], ["---", *[":-:" for _ in methods]]]
    lines += [[model, *(marks[method] for method in methods)] for model, marks in rows.items()]
    text = "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)
    return "\n".join([text, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]).rstrip()


def brief(outcome: Outcome) -> str:
    """The kind of a reason: its first sentence, without the names of one method and one network."""
    sentence = re.split(r"(?<=[^.\d])[.;](?=\s|$)", outcome.reason.strip(), maxsplit=1)[0]
    sentence = re.sub(rf"^({'|'.join(method.__name__ for method in library_methods())}):? ", "", sentence)
    networks = rf"\b({Task.__name__}|{type(MODELS[outcome.model].network()).__name__})\b"
    sentence = re.sub(networks, "the model", re.sub(r"'[\w.]+\.[\w.]+'", "a layer", sentence))
    return re.sub(r"^[a-z]+\b(?!=)", lambda word: word[0].capitalize(), sentence)


def replaced(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the markers."""
    return f"{readme.partition(BEGIN)[0]}{BEGIN}\n{text}\n{END}{readme.partition(END)[2]}"


def read_table(readme: str) -> Iterator[list[str]]:
    """The cells of each row of the README's table, that of the heads first."""
    for line in readme.partition(BEGIN)[2].partition(END)[0].splitlines():
        if line.startswith("|") and "---" not in line:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def main() -> int:
    """Print the table; with ``--write`` put it into the README. Nothing is written if a cell fails."""
    for library in ("lightning.pytorch", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    readme = README.read_text()
    if (write := "--write" in sys.argv[1:]) and not (BEGIN in readme and END in readme):
        print(f"The README has no {BEGIN} and {END}: put them where the table is to stand.", file=sys.stderr)
        return 1
    outcomes = run_all()
    print(table(outcomes))
    if broken := [outcome for outcome in outcomes if outcome.mark == BROKEN]:
        print(*(f"{outcome.method} on {outcome.model}: {outcome.reason}" for outcome in broken), sep="\n")
        return 1
    if write:
        README.write_text(replaced(readme, table(outcomes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
