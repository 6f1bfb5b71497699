"""Loading an adapter from a directory: what is refused. The model is as it was afterwards."""

import copy
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from snapshot import Snapshot
from torch import nn

from lightning_peft import (
    BitFit,
    BottleneckAdapter,
    LoRA,
    Method,
    PEFTError,
    PrefixTuning,
    PTuning,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.checkpoints import files
from lightning_peft.errors import AdapterKeyError, AdapterNameError, BaseMismatchError, CheckpointError, ConfigError

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "lightning_peft.json"
METHODS: dict[str, Method] = {
    "in peft's format": LoRA(r=2, target_modules=["query", "value"]),
    "in our own": BottleneckAdapter(),
}
METHOD = METHODS["in peft's format"]


@pytest.fixture
def base() -> nn.Module:
    return tiny_models.bert().eval()


def saved(base: nn.Module, path: Path, method: Method = METHOD) -> Path:
    """The directory of a new adapter."""
    model = copy.deepcopy(base)
    inject(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * torch.randn_like(parameter))
    save_adapter(model, path)
    return path


def refused(model: nn.Module, path: Path, kind: type[PEFTError] = CheckpointError, name: str = "default") -> str:
    """The message of the refusal; the model is unchanged."""
    before = Snapshot(model)
    with pytest.raises(kind) as caught:
        load_adapter(model, path, name)
    before.assert_same(model)
    return str(caught.value)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def reseal(path: Path, **values: Any) -> None:
    """Edit the record as its writer would, checksums included."""
    record = {**json.loads((path / MANIFEST).read_text()), **values}
    contents = {name: (path / name).read_bytes() for name in (CONFIG, TENSORS)}
    (path / MANIFEST).write_bytes(files.to_json(files.with_checksums(record, contents)))


def as_peft(path: Path) -> Path:
    (path / MANIFEST).unlink()
    return path


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS, {"format": "pt"})


# The files themselves


def test_an_alpha_edited_after_training_is_refused_and_can_be_insisted_on(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path)
    edit(tmp_path / CONFIG, lora_alpha=99)
    message = refused(base, tmp_path)
    assert "adapter_config.json is not the file that was written with this adapter" in message
    assert "delete lightning_peft.json" in message
    load_adapter(base, as_peft(tmp_path))
    assert base.bert.encoder.layer[0].attention.self.query.peft.default.scale == 99 / 2


@pytest.mark.parametrize("which", METHODS)
@pytest.mark.parametrize("name", [CONFIG, TENSORS, MANIFEST])
def test_a_flipped_bit_anywhere_is_refused(base: nn.Module, which: str, name: str, tmp_path: Path) -> None:
    file = saved(base, tmp_path, METHODS[which]) / name
    data = file.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 25)):
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        refused(base, tmp_path, PEFTError)
    file.write_bytes(data)
    load_adapter(base, tmp_path)


@pytest.mark.parametrize("name", [CONFIG, TENSORS, MANIFEST])
@pytest.mark.parametrize("keep", [0, 1, 9, 0.5, 0.99])
def test_a_truncated_file_is_refused(base: nn.Module, name: str, keep: float, tmp_path: Path) -> None:
    file = saved(base, tmp_path) / name
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert str(tmp_path) in refused(base, tmp_path)
    if name != MANIFEST:
        assert name in refused(base, as_peft(tmp_path))


def test_the_white_space_of_the_json_does_not_matter(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path)
    for name in (CONFIG, MANIFEST):
        edit(tmp_path / name)
    load_adapter(base, tmp_path)


def test_what_holds_no_tensor_may_have_its_place_elsewhere_and_the_rest_may_not(tmp_path: Path) -> None:
    """What moves positions stood at the rotary embedding once, and stands at the stack of blocks now."""
    base = tiny_models.llama().eval()
    saved(base, tmp_path, PrefixTuning(num_virtual_tokens=3))
    places = json.loads((tmp_path / MANIFEST).read_text())["places"]
    assert "model:positions" in places
    ids = torch.arange(3, 9)[None]
    load_adapter(now := copy.deepcopy(base), tmp_path)
    reseal(tmp_path, places=[place.replace("model:positions", "model.rotary_emb:positions") for place in places])
    load_adapter(then := copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(then(ids).logits, now(ids).logits)
    reseal(tmp_path, places=[place for place in places if not place.endswith("1.self_attn")])
    assert "differ in 'model.layers.1.self_attn'" in refused(base, tmp_path)


def test_no_mixture_of_two_adapters_loads(base: nn.Module, tmp_path: Path) -> None:
    """As when writing one over another is broken off, or two are copied into one directory."""
    versions = [saved(base, tmp_path / "0"), saved(base, tmp_path / "1", LoRA(r=2, alpha=7, target_modules=["query"]))]
    for chosen in product((0, 1), repeat=3):
        mixed = tmp_path / "mixed"
        mixed.mkdir(exist_ok=True)
        for name, version in zip((CONFIG, TENSORS, MANIFEST), chosen, strict=True):
            shutil.copy(versions[version] / name, mixed / name)
        if len(set(chosen)) == 1:
            load_adapter(copy.deepcopy(base), mixed)
        else:
            refused(base, mixed)


def test_what_a_failed_write_leaves_is_refused(base: nn.Module, tmp_path: Path) -> None:
    """A folder stands where the second file goes, so that only the record gets there."""
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        saved(base, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, MANIFEST]  # and nothing half-written
    (tmp_path / CONFIG).rmdir()
    assert "no adapter_config.json" in refused(base, tmp_path)
    saved(base, tmp_path)
    load_adapter(base, tmp_path)


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_a_missing_file_is_named(base: nn.Module, missing: str, tmp_path: Path) -> None:
    (saved(base, tmp_path) / missing).unlink()
    assert missing in refused(base, tmp_path)
    assert missing in refused(base, as_peft(tmp_path))


def test_a_directory_that_is_none(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapters" / "film")
    assert "There is no directory" in refused(base, tmp_path / "no")
    assert "but a file" in refused(base, tmp_path / "adapters" / "film" / CONFIG)
    assert "There are some below it: 'film'" in refused(base, tmp_path / "adapters")


def test_a_pickle_is_not_loaded(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path)
    torch.save(load_file(tmp_path / TENSORS), as_peft(tmp_path) / "adapter_model.bin")
    (tmp_path / TENSORS).unlink()
    message = refused(base, tmp_path)
    assert "a pickle, which is never loaded" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{", "\x00"])
@pytest.mark.parametrize("name", [CONFIG, MANIFEST])
def test_json_of_another_kind_is_refused(base: nn.Module, name: str, text: str, tmp_path: Path) -> None:
    saved(base, tmp_path)
    (tmp_path / name).write_text(text)
    refused(base, tmp_path)
    if name == CONFIG:
        assert CONFIG in refused(base, as_peft(tmp_path))


# What the record says


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"version": 99}, CheckpointError, "newer lightning_peft .version 99"),
        ({"version": "1"}, CheckpointError, "its version is '1'"),
        ({"method": {"method": "Unheard"}}, ConfigError, "There is no method 'Unheard'"),
        ({"method": {"method": "LoRA", "r": 2, "rank": 3}}, ConfigError, "LoRA has no field 'rank'"),
        ({"method": None}, ConfigError, "There is no method None"),
        ({"places": None}, CheckpointError, "its places is None"),
        ({"places": ["bert.nowhere"]}, CheckpointError, "bert.nowhere|1 places"),
        ({"modules_to_save": [3]}, CheckpointError, "its modules_to_save is"),
        ({"in_peft_format": "yes"}, CheckpointError, "its in_peft_format is 'yes'"),
        ({"base": {}}, CheckpointError, "record of the base"),
        ({"base": {"samples": "x"}}, CheckpointError, "record of the base"),
        ({"sha256": None}, CheckpointError, "has no checksums"),
    ],
)
def test_a_record_that_cannot_be_is_refused(
    base: nn.Module, values: dict[str, Any], kind: type[PEFTError], message: str, tmp_path: Path
) -> None:
    saved(base, tmp_path)
    if "sha256" in values:
        edit(tmp_path / MANIFEST, **values)
    else:
        reseal(tmp_path, **values)
    before = Snapshot(base)
    with pytest.raises(kind, match=message):
        load_adapter(base, tmp_path)
    before.assert_same(base)


# The model


def test_another_base_is_refused(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path)
    nn.init.normal_(base.bert.encoder.layer[1].output.dense.weight)
    assert "'bert.encoder.layer.1.output.dense.weight'" in refused(base, tmp_path, BaseMismatchError)
    other = tiny_models.bert(num_hidden_layers=3)
    assert "belongs to another base" in refused(other, tmp_path, BaseMismatchError)
    assert "belongs to another base" in refused(tiny_models.bert(hidden_size=32), tmp_path, BaseMismatchError)


def test_two_transformers_models_are_one_too_many(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path)
    assert "does not hold exactly one" in refused(nn.ModuleList([base, copy.deepcopy(base)]), tmp_path)
    assert "does not hold exactly one" in refused(nn.Linear(2, 2), tmp_path)


def test_a_name_that_is_taken_is_refused(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path)
    load_adapter(base, tmp_path)
    assert "There is an adapter 'default' already" in refused(base, tmp_path, AdapterNameError)
    refused(base, tmp_path, AdapterNameError, "a.b")
    load_adapter(base, tmp_path, "second")


def test_a_model_without_values_is_refused(base: nn.Module, tmp_path: Path) -> None:
    saved(base, tmp_path)
    with pytest.raises(CheckpointError, match="meta device"):
        load_adapter(base.to("meta"), tmp_path)


def test_only_an_adapter_that_is_there_can_be_saved(base: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(AdapterNameError, match="has no adapter 'default'"):
        save_adapter(base, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_directory_that_cannot_be_made_is_refused(base: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        saved(base, tmp_path / "file" / "below")


# The tensors

CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(min(t)), "lacks|no tensors for it|belong to no adapter"),
    "unknown": (lambda t: t.update({f"{min(t)}er": torch.zeros(1)}), "belong"),
    "misshapen": (lambda t: t.update({min(t): t[min(t)][:-1].clone()}), "must have shape|rank"),
    "whole numbers": (lambda t: t.update({min(t): t[min(t)].int()}), "it is damaged"),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("which", [*METHODS, "from peft"])
def test_tensors_that_do_not_fit_are_refused(base: nn.Module, which: str, how: str, tmp_path: Path) -> None:
    """Even with checksums that hold, and in a directory without any."""
    change, message = CHANGES[how]
    saved(base, tmp_path, METHODS.get(which, METHOD))
    rewrite(tmp_path, change)
    if which == "from peft":
        as_peft(tmp_path)
    else:
        reseal(tmp_path)
    before = Snapshot(base)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(base, tmp_path)
    before.assert_same(base)


def test_a_truncated_file_of_an_encoder_is_refused(base: nn.Module, tmp_path: Path) -> None:
    file = saved(base, tmp_path, PTuning(num_virtual_tokens=3)) / "lightning_peft.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "lightning_peft.safetensors" in refused(base, tmp_path)
    file.unlink()
    assert "lightning_peft.safetensors" in refused(base, tmp_path)


def test_a_method_of_our_own_cannot_be_read_without_its_record(base: nn.Module, tmp_path: Path) -> None:
    assert f"has no {MANIFEST}" in refused(base, as_peft(saved(base, tmp_path, BitFit())))


# A directory of peft


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"peft_type": "ADALORA"}, CheckpointError, "peft_type='ADALORA' has no counterpart here; known are IA3, LN"),
        ({"peft_type": None}, CheckpointError, "peft_type=None has no counterpart"),
        ({"peft_type": ["LORA"]}, CheckpointError, "has no counterpart"),
        ({"use_dora": True}, AdapterKeyError, r"lacks 4 of \d+ adapter tensors, first '.*lora_magnitude_vector'"),
        ({"use_dora": "yes"}, CheckpointError, "use_dora='yes' of a LORA adapter has no counterpart .* train without"),
        ({"lora_bias": True}, CheckpointError, "lora_bias=True"),
        ({"bias": "all"}, CheckpointError, "bias='all'"),
        ({"layer_replication": [[0, 1]]}, CheckpointError, "layer_replication="),
        ({"trainable_token_indices": [1]}, CheckpointError, "trainable_token_indices="),
        ({"init_lora_weights": "pissa"}, CheckpointError, "init_lora_weights='pissa'"),
        ({"of_a_later_version": 0.5}, CheckpointError, "of_a_later_version=0.5"),
        ({"r": 5}, CheckpointError, "the rank 5, and its tensors have 2"),
        ({"r": "2"}, CheckpointError, "r must be a whole number, not '2'"),
        ({"lora_alpha": None}, CheckpointError, "lora_alpha must be a number"),
        ({"lora_alpha": -1}, ConfigError, r"LoRA\.alpha must be a number greater than 0"),
        ({"use_rslora": "no"}, CheckpointError, "use_rslora must be true or false"),
        ({"rank_pattern": ["query"]}, CheckpointError, "rank_pattern must map"),
        ({"alpha_pattern": {"(": 3}}, CheckpointError, "alpha_pattern must map"),
        ({"target_modules": {"query": 1}}, CheckpointError, "target_modules must be a string"),
        ({"target_modules": "("}, CheckpointError, "no regular expression"),
        ({"modules_to_save": 3}, CheckpointError, "modules_to_save must be a string"),
        ({"layers_to_transform": "1", "target_modules": ["query"]}, CheckpointError, "a list of indices"),
        ({"target_modules": ["query", "value", "key"]}, BaseMismatchError, r"means 'bert\..*\.key' too, and the file"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_the_name_of_the_field(
    base: nn.Module, values: dict[str, Any], kind: type[PEFTError], message: str, tmp_path: Path
) -> None:
    edit(as_peft(saved(base, tmp_path)) / CONFIG, **values)
    before = Snapshot(base)
    with pytest.raises(kind, match=message):
        load_adapter(base, tmp_path)
    before.assert_same(base)


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_of_another_number_of_layers_is_refused(base: nn.Module, layers: int, tmp_path: Path) -> None:
    other = tiny_models.bert(num_hidden_layers=layers)
    edit(as_peft(saved(other, tmp_path)) / CONFIG, target_modules=["query", "value"])
    refused(base, tmp_path, BaseMismatchError)


def test_a_table_of_the_base_in_the_file_must_be_the_models(base: nn.Module, tmp_path: Path) -> None:
    """peft saves the embedding with an adapter on it, and whenever it was enlarged."""
    key = "base_model.model.bert.embeddings.word_embeddings.weight"
    table = base.bert.embeddings.word_embeddings.weight.detach()
    as_peft(saved(base, tmp_path))
    for other in (table + 1, torch.cat([table, table])):
        rewrite(tmp_path, lambda tensors, other=other: tensors.update({key: other}))
        assert "its own values for 'bert.embeddings.word_embeddings.weight'" in refused(
            base, tmp_path, BaseMismatchError
        )
    rewrite(tmp_path, lambda tensors: tensors.update({key: table.half()}))
    load_adapter(base, tmp_path)


def test_a_key_that_peft_does_not_write_is_refused(base: nn.Module, tmp_path: Path) -> None:
    as_peft(saved(base, tmp_path))
    rewrite(tmp_path, lambda tensors: tensors.update({"bert.pooler.dense.lora_A.weight": torch.zeros(2, 16)}))
    assert "does not begin with 'base_model.model.'" in refused(base, tmp_path, AdapterKeyError)
