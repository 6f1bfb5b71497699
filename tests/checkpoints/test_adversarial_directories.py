"""Damaged and hostile adapter directories: each ends in this library's error, or in a load equal to the original.

Edits that make another valid directory once their checksums are made anew are left out, as they are of checkpoints.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random

import mutations
import pytest
import torch
from adversarial import peak_memory
from safetensors.torch import load_file, save_file
from snapshot import Snapshot
from tiny_models import bert
from torch import Tensor, nn

from lightning_peft import BottleneckAdapter, Combine, LoRA, Method, PrefixTuning, inject, load_adapter, save_adapter
from lightning_peft.checkpoints import files
from lightning_peft.checkpoints.ckpt import adapter_state
from lightning_peft.checkpoints.directory import MANIFEST, TENSORS, TRAINED
from lightning_peft.checkpoints.guard import check_bounds
from lightning_peft.checkpoints.peft.state import CONFIG
from lightning_peft.errors import PEFTError

METHODS: dict[str, Method] = {
    "lora": LoRA(r=2, target_modules=["query", "value"]),
    "prefix, with its MLP": PrefixTuning(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
    "bottleneck": BottleneckAdapter(width=4),
    "combine": Combine([LoRA(r=2, target_modules=["query"]), BottleneckAdapter(preset="pfeiffer", width=4)]),
}
SUMS = ("made anew", "made anew", "stale", "record gone")


def base() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return bert()


@pytest.fixture(params=METHODS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A directory of an adapter with random values, and these."""
    model = base()
    inject(model, METHODS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "whole")
    return tmp_path / "whole", adapter_state(model)


def sealed_anew(path: Path) -> None:
    """Make the checksums those of the files, as an attacker would."""
    record = json.loads((path / MANIFEST).read_text())
    if isinstance(record, dict):
        contents = {name: (path / name).read_bytes() for name in (CONFIG, TENSORS, TRAINED) if (path / name).exists()}
        (path / MANIFEST).write_bytes(files.to_json(files.with_checksums(record, contents), indent=None))


def damaged(whole: Path, path: Path, seed: int, count: int) -> Iterator[str]:
    """Write ``count`` damaged copies of ``whole`` to ``path``, one after the other."""
    random, done = Random(seed), 0
    while done < count:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        file = random.choice(sorted(path.iterdir()))
        total = random.choice(SUMS)
        try:
            if random.random() < 0.25:
                total = "stale"  # else what is flipped is another finite number
                what, content = random.choice(list(mutations.bytes_of(file.read_bytes(), random, 30)))
                file.write_bytes(content)
            elif file.suffix == ".json":
                ((what, value),) = mutations.values_of(json.loads(file.read_text()), random, 1)
                check_bounds(value)  # JSON unfolds what it writes
                file.write_text(json.dumps(value))
            else:
                ((what, value),) = mutations.values_of(load_file(file), random, 1)
                save_file({key: tensor.contiguous() for key, tensor in value.items()}, file)
            if total == "made anew":
                sealed_anew(path)
            elif total == "record gone" and not (path / TRAINED).exists():  # peft has another adapter then
                (path / MANIFEST).unlink()
        except Exception:  # such a file cannot be written
            continue
        if total == "record gone" and what.endswith(("fp16", "bf16")):  # as many directories of peft are
            continue
        done += 1
        yield f"{file.name}, {what}, the sums {total}"


def check(written: tuple[Path, dict[str, Tensor]], seed: int, count: int) -> None:
    whole, values = written
    model, wrong, before = base(), [], peak_memory()
    snapshot = Snapshot(model)
    for what in damaged(whole, whole.with_name("damaged"), seed, count):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_adapter(model, whole.with_name("damaged"))
            found = adapter_state(model)
            assert found.keys() == values.keys(), "other keys"
            for key in values:
                assert torch.equal(found[key], values[key]), key
            model = base()
            snapshot = Snapshot(model)
        except PEFTError:
            snapshot.assert_same(model)
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            model = base()
            snapshot = Snapshot(model)
    assert not wrong, "\n".join(wrong)
    assert peak_memory() - before < 300


def test_a_few_damaged_directories_are_refused_or_equal(written):
    check(written, seed=0, count=8)


@pytest.mark.soak
@pytest.mark.parametrize("chunk", range(20))
def test_damaged_directories_are_refused_or_equal(written, chunk):
    check(written, seed=chunk + 1, count=75)


@pytest.mark.parametrize("value", [10**9, 2**62, 10**30])
@pytest.mark.parametrize("field", ["num_virtual_tokens", "encoder_hidden_size"])
@pytest.mark.parametrize("by_peft", [False, True])
@pytest.mark.parametrize("written", ["prefix, with its MLP"], indirect=True)
def test_a_huge_number_is_refused_before_anything_is_allocated(written, value, field, by_peft):
    path, _ = written
    file = path / (CONFIG if by_peft else MANIFEST)
    content = json.loads(file.read_text())
    (content if by_peft else content["method"])[field] = value
    file.write_text(json.dumps(content))
    if by_peft:
        (path / MANIFEST).unlink()
    else:
        sealed_anew(path)
    model, before = base(), peak_memory()
    snapshot = Snapshot(model)
    if by_peft and field == "encoder_hidden_size":  # what it tells the MLP is of no use without the MLP
        load_adapter(model, path)
    else:
        with pytest.raises(PEFTError):
            load_adapter(model, path)
        snapshot.assert_same(model)
    assert peak_memory() - before < 100
