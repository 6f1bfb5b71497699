"""What an adapter directory says of itself, and of its fit to a model."""

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from snapshot import Snapshot
from torch import nn

from lightning_peft import BottleneckAdapter, LoRA, PTuning, inject, inspect_adapter, load_adapter, save_adapter
from lightning_peft.errors import CheckpointError

QUERY = "bert.encoder.layer.{}.attention.self.query"


@pytest.fixture
def base() -> nn.Module:
    return tiny_models.bert()


@pytest.fixture
def trained(base: nn.Module, tmp_path: Path) -> nn.Module:
    model = copy.deepcopy(base)
    inject(model, LoRA(r=2, alpha=5, target_modules=["query"]))
    save_adapter(model, tmp_path)
    return model


def test_the_summary_says_what_is_in_the_files(trained: nn.Module, base: nn.Module, tmp_path: Path) -> None:
    summary = inspect_adapter(tmp_path)
    assert summary.method == "LoRA"
    assert summary.config["r"] == 2
    assert summary.places == (QUERY.format(0), QUERY.format(1), "classifier")
    assert summary.modules_to_save == ("classifier",)
    assert (summary.tensors, summary.parameters) == (6, 2 * 2 * 2 * 16 + 2 * 16 + 2)
    assert summary.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    frozen = [p for name, p in base.named_parameters() if not name.startswith("classifier")]
    assert summary.base_parameters == sum(p.numel() for p in frozen)
    assert summary.base_tensors == len(frozen)
    assert summary.written_here
    assert summary.fits is None
    text = str(summary)
    for part in ("LoRA", "r=2", "alpha=5", QUERY.format(1), "classifier", "6 (162 numbers)", "checksums hold"):
        assert part in text
    assert "Fits" not in text


def test_a_directory_of_peft_says_less(trained: nn.Module, base: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "lightning_peft.json").unlink()
    summary = inspect_adapter(tmp_path, base)
    assert (summary.method, summary.written_here, summary.base_parameters) == ("LORA", False, None)
    assert summary.places == (QUERY.format(0), QUERY.format(1))
    assert summary.modules_to_save == ("classifier",)
    assert summary.fits
    assert "unknown" in str(summary)


def test_whether_it_fits_a_model_which_is_left_alone(trained: nn.Module, base: nn.Module, tmp_path: Path) -> None:
    loaded = copy.deepcopy(base)
    load_adapter(loaded, tmp_path)
    other = copy.deepcopy(base)
    nn.init.normal_(other.bert.pooler.dense.weight)
    for model, misfit in ((base, ""), (loaded, ""), (base.to("meta"), ""), (other, "bert.pooler.dense.weight")):
        before, state = Snapshot(model), torch.get_rng_state()
        summary = inspect_adapter(tmp_path, model)
        assert torch.equal(torch.get_rng_state(), state)
        if not next(model.parameters()).is_meta:
            before.assert_same(model)
        assert summary.fits is (misfit == "")
        assert misfit in (summary.misfit or "")
        assert ("no: The adapter belongs to another base" if misfit else "yes") in str(summary)


def test_what_peft_alone_needs_is_not_counted(base: nn.Module, tmp_path: Path) -> None:
    inject(base, PTuning(num_virtual_tokens=3, encoder_hidden_size=4, modules_to_save=None))
    save_adapter(base, tmp_path)
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    # The head that peft wants with the task of the model is in the files as well.
    assert (
        inspect_adapter(tmp_path).parameters == trained + base.classifier.weight.numel() + base.classifier.bias.numel()
    )


def test_a_method_that_peft_does_not_have(base: nn.Module, tmp_path: Path) -> None:
    inject(base, BottleneckAdapter())
    save_adapter(base, tmp_path)
    summary = inspect_adapter(tmp_path)
    assert summary.method == "BottleneckAdapter"
    assert summary.parameters == sum(p.numel() for p in base.parameters() if p.requires_grad)


def test_an_edited_directory_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 5', '"lora_alpha": 50'))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not the file"):
        inspect_adapter(tmp_path)
