"""Damaged and hostile ``.ckpt`` files: each ends in this library's error, or in a load equal to the original.

Left out are edits that make another valid file once their checksum is deleted or made anew, such as another finite
number in a tensor: nothing tells them from what a training wrote. What Lightning, torch and callbacks wrote for
themselves is guarded by the checksum alone.
"""

import logging
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import mutations
import pytest
import torch
from adversarial import Case, cases, outcomes, peak_memory, resaved

from lightning_peft.errors import CheckpointError, PEFTError

NAMES = ("lora", "lora, full", "combine", "lora, full, own", "prefix")
PARTS: dict[str, tuple[str, ...]] = {
    "bytes": (),
    "anything": ("",),
    "record": ("lightning_peft",),
    "tensors": ("state_dict",),
    "training": ("optimizer_states", "lr_schedulers", "callbacks", "loops"),
}
SUMS = ("deleted", "made anew", "stale")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Hundreds of Trainers have nothing to say."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The trained checkpoint of a name, made once."""
    known = cases(tmp_path_factory.mktemp("adversarial"))
    done: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in done:
            done[name] = known[name]()
        return done[name]

    return make


def damaged(case: Case, part: str, seed: int, count: int, path: Path) -> Iterator[str]:
    """Write ``count`` damaged files to ``path``, one after the other."""
    random = Random(f"{part} {seed}")
    if part == "bytes":
        for what, content in mutations.bytes_of(case.bytes, random, count):
            path.write_bytes(content)
            yield what
        return
    checkpoint, written = case.checkpoint, 0
    while written < count:
        top = random.choice(PARTS[part])
        for what, changed in mutations.values_of(checkpoint, random, 1, (top,) if top else ()):
            total = random.choice(SUMS)
            if _is_of_others(what):
                total = "stale"
            elif total != "stale" and _another_valid_file(what):
                continue
            resaved(changed, path, total)
            written += 1
            yield f"{what}, the sum {total}"


def _is_of_others(what: str) -> bool:
    return any(what.startswith(f"[{part!r}]") for part in PARTS["training"])


def _another_valid_file(what: str) -> bool:
    # The base's own copy of a module that is fully trained is never read, so the file has no record of it either.
    return "['net.5.weight']" in what or "['net.5.bias']" in what


def check(case: Case, part: str, seed: int, count: int) -> None:
    path, wrong = case.folder / "damaged.ckpt", []
    before, refused = peak_memory(), 0
    for what in damaged(case, part, seed, count, path):
        for way, error in outcomes(case, path):
            refused += isinstance(error, PEFTError)
            if error is not None and not isinstance(error, PEFTError):
                wrong.append(f"{what}, {way}: {type(error).__name__}: {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)
    assert refused  # else nothing was damaged
    assert peak_memory() - before < 300


@pytest.mark.parametrize("name", NAMES)
def test_the_undamaged_file_loads_in_every_way(made, name):
    case = made(name)
    (case.folder / "whole.ckpt").write_bytes(case.bytes)
    assert {error for _, error in outcomes(case, case.folder / "whole.ckpt")} == {None}


@pytest.mark.parametrize("name", NAMES)
def test_a_few_damaged_files_are_refused_or_equal(made, name):
    for part, count in {"bytes": 2, "anything": 1, "record": 2, "tensors": 2, "training": 2}.items():
        check(made(name), part, seed=NAMES.index(name), count=count)


@pytest.mark.soak
@pytest.mark.parametrize("chunk", range(10))
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_or_equal(made, name, part, chunk):
    check(made(name), part, seed=100 * (chunk + 1) + NAMES.index(name), count=24)


@pytest.mark.parametrize("change", mutations.TENSOR_CHANGES)
def test_a_tensor_of_another_kind_is_refused_without_a_sum(made, change, tmp_path):
    case = made("lora, full")
    for key in ("net.0.peft.default.lora_A", "net.3.weight"):
        path = ("state_dict", key)
        resaved(mutations.changed(case.checkpoint, path, mutations.TENSOR_CHANGES[change]), tmp_path / "x", "deleted")
        for way, error in outcomes(case, tmp_path / "x"):
            assert isinstance(error, CheckpointError), (key, way)


def test_a_folder_in_place_of_a_file_is_refused(made, tmp_path):
    assert {type(error) for _, error in outcomes(made("combine"), tmp_path)} == {CheckpointError}


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 10**9), ("r", 2**62), ("rank_pattern", {"0": 10**9}), ("layers", [10**30]), ("alpha", 1e400), ("r", 10**30)],
)
def test_a_huge_number_in_a_method_is_refused_before_anything_is_allocated(made, field, value, tmp_path):
    case, before = made("lora"), peak_memory()
    path = ("lightning_peft", "adapters", ":default", "method", field)
    resaved(mutations.changed(case.checkpoint, path, lambda _: value), tmp_path / "huge.ckpt", "made anew")
    for way, error in outcomes(case, tmp_path / "huge.ckpt"):
        assert isinstance(error, PEFTError), way
    assert peak_memory() - before < 100


@pytest.mark.parametrize("field", ["num_virtual_tokens", "encoder_hidden_size"])
@pytest.mark.parametrize("value", [10**9, 2**62, 10**30])
def test_a_huge_prompt_is_refused_before_anything_is_allocated(made, field, value, tmp_path):
    case, before = made("prefix"), peak_memory()
    path = ("lightning_peft", "adapters", ":default", "method", field)
    resaved(mutations.changed(case.checkpoint, path, lambda _: value), tmp_path / "huge.ckpt", "made anew")
    for way, error in outcomes(case, tmp_path / "huge.ckpt"):
        assert isinstance(error, PEFTError), way
    assert peak_memory() - before < 100


# Code in the file -----------------------------------------------------------------------------------------------------


class Payload:
    """Runs ``call`` when it is unpickled by a loader that runs code."""

    def __init__(self, call: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def payloads(marker: Path) -> dict[str, Payload]:
    """Code that would write ``marker``, in several dresses."""
    return {
        "a call": Payload((Path.touch, (marker,))),
        "eval": Payload((eval, (f"__import__('pathlib').Path({str(marker)!r}).touch()",))),
        "os.system": Payload((os.system, (f"touch {marker}",))),
        "a tensor's hook": Payload((torch._utils._rebuild_parameter, (Payload((Path.touch, (marker,))), False, {}))),
    }


@pytest.mark.parametrize("dress", payloads(Path()))
@pytest.mark.parametrize(
    "place",
    [
        ("state_dict", "net.0.peft.default:0.lora_A"),
        ("hyper_parameters", "lr"),
        ("lightning_peft", "adapters"),
        ("lightning_peft", "checksum"),
        ("optimizer_states",),
        ("callbacks",),
    ],
    ids=lambda place: place[0] + place[-1][-8:],
)
def test_code_in_a_file_never_runs(made, place, dress, tmp_path):
    case, marker = made("combine"), tmp_path / "was_run"
    changed = mutations.changed(case.checkpoint, place, lambda _: payloads(marker)[dress])
    torch.save(changed, tmp_path / "new.ckpt")
    torch.save(changed, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(payloads(marker)[dress]))
    for path in tmp_path.glob("*.ckpt"):
        for way, error in outcomes(case, path):
            assert isinstance(error, CheckpointError), (path.name, way)
    assert not marker.exists()
    with suppress(TypeError):  # of what is built from what the code returned
        pickle.loads((tmp_path / "plain.ckpt").read_bytes())
    assert marker.exists()  # so it is code indeed


@pytest.mark.parametrize(
    "names",
    [
        {"_instantiator": "os.system"},
        {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "subprocess.Popen"},
        {"_instantiator": 3},
    ],
)
def test_hyperparameters_cannot_name_another_class(made, names, tmp_path):
    case = made("combine")
    changed = mutations.changed(case.checkpoint, ("hyper_parameters",), lambda found: {**found, **names})
    resaved(changed, tmp_path / "named.ckpt", "made anew")
    found = dict(outcomes(case, tmp_path / "named.ckpt"))
    assert isinstance(found["load_from_checkpoint"], CheckpointError)
    assert isinstance(found["PEFTModule.load_from_checkpoint"], CheckpointError)
    assert found["test"] is None  # the Trainer has its module already, and reads none of them
