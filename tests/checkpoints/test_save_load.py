"""Saving an adapter to a directory and loading it: what goes well."""

import copy
import json
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from snapshot import assert_identical
from torch import nn

from lightning_peft import (
    IA3,
    BitFit,
    BottleneckAdapter,
    Combine,
    LoRA,
    Method,
    PrefixTuning,
    PTuning,
    active_adapters,
    inject,
    load_adapter,
    remove,
    save_adapter,
)
from lightning_peft.checkpoints.ckpt import adapter_state

IDS = torch.arange(3, 13).view(2, 5)


class Wrapper(nn.Module):
    """As a LightningModule holds its network, beside parts of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.metric = network, nn.Linear(2, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.network(ids)


@torch.no_grad()
def train(model: nn.Module, method: Method, name: str = "default") -> nn.Module:
    """``model`` with an adapter that has moved."""
    inject(model, method, name)
    for parameter in model.parameters():
        parameter.add_(parameter.requires_grad * 0.1 * torch.randn_like(parameter))
    return model.eval()


EXPRESSIONS = {
    "LoRA": LoRA(
        r=4,
        alpha=3.3,
        dropout=0.1,
        target_modules=r"network\.bert\..*(query|output\.dense)",
        rank_pattern={r"network\..*1.*query": 2},
        alpha_pattern={"query": 7},
    ),
    "IA3": IA3(
        target_modules=r"network\.bert\..*(query|output\.dense)", feedforward_modules=r"network.*\d\.output\.dense"
    ),
    "BitFit": BitFit(target_modules=r"network\.bert\..*query"),
    "Bottleneck": BottleneckAdapter(target_modules=r"network\.bert\..*intermediate"),
    "saved": LoRA(r=1, target_modules=["key"], modules_to_save=["network.classifier", "network.bert.pooler"]),
}


@pytest.mark.parametrize("which", EXPRESSIONS)
def test_patterns_that_were_written_for_a_wrapper_mean_the_same_layers_without_it(which: str, tmp_path: Path) -> None:
    base = tiny_models.bert().eval()
    trained = train(Wrapper(copy.deepcopy(base)), EXPRESSIONS[which])
    save_adapter(trained, tmp_path)
    load_adapter(base, tmp_path)
    assert_identical(base(IDS).logits, trained(IDS).logits)
    expected = {key.removeprefix("network."): tensor for key, tensor in adapter_state(trained).items()}
    assert set(adapter_state(base)) == set(expected)


def test_training_goes_on_from_an_encoder_that_peft_does_not_keep(tmp_path: Path) -> None:
    for method in (PTuning(num_virtual_tokens=3), PrefixTuning(num_virtual_tokens=3, prefix_projection=True)):
        base = tiny_models.gpt2().eval()
        trained, fresh = train(copy.deepcopy(base), method), copy.deepcopy(base)
        save_adapter(trained, tmp_path)
        load_adapter(fresh, tmp_path)
        for key, tensor in adapter_state(trained).items():
            assert_identical(adapter_state(fresh)[key], tensor, key)
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}


def test_what_is_over_is_no_longer_in_the_directory(tmp_path: Path) -> None:
    model = train(tiny_models.gpt2(), PTuning(num_virtual_tokens=3))
    save_adapter(model, tmp_path)
    remove(model)
    train(model, LoRA(r=2))
    save_adapter(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lightning_peft.json"
    }  # fmt: skip


def test_one_of_several_adapters_is_saved_and_added_to_others(tmp_path: Path) -> None:
    """With the head of one, and none in the other, whose base the head's own values are part of."""
    base = tiny_models.bert().eval()
    model = train(copy.deepcopy(base), LoRA(r=2))
    train(model, LoRA(r=2, target_modules=["key"], modules_to_save=None), "second")
    for name in ("default", "second"):
        save_adapter(model, tmp_path / name, name)
    expected = model(IDS).logits
    for order in (("default", "second"), ("second", "default")):
        fresh = copy.deepcopy(base)
        for name in order:
            load_adapter(fresh, tmp_path / name, name)
        assert active_adapters(fresh) == order
        torch.testing.assert_close(fresh(IDS).logits, expected)


def test_a_head_that_starts_at_random_comes_with_the_adapter(tmp_path: Path) -> None:
    base = tiny_models.bert().eval()
    trained = train(copy.deepcopy(base), LoRA(r=2))
    save_adapter(trained, tmp_path)
    nn.init.normal_(base.classifier.weight)
    load_adapter(base, tmp_path)
    assert_identical(base(IDS).logits, trained(IDS).logits)


def test_tied_weights_that_were_trained_whole_stay_tied(tmp_path: Path) -> None:
    base = tiny_models.llama().eval()
    method = LoRA(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trained = train(copy.deepcopy(base), method)
    save_adapter(trained, tmp_path)
    load_adapter(base, tmp_path)
    assert_identical(base(IDS).logits, trained(IDS).logits)
    assert base.model.embed_tokens.peft.default.weight is base.lm_head.peft.default.weight


def test_an_adapter_of_a_module_without_a_transformers_model(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sequential(nn.Linear(5, 5))).eval()
    trained, fresh = copy.deepcopy(base), copy.deepcopy(base)
    train(trained, LoRA(r=2, target_modules=["0"], modules_to_save=["1"]))
    save_adapter(trained, tmp_path)
    load_adapter(fresh, tmp_path)
    x = torch.randn(3, 4)
    assert_identical(fresh(x), trained(x))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(loaded(x), trained(x))


def test_a_name_that_ends_another_one_is_not_taken_for_it(tmp_path: Path) -> None:
    """In lists of names, peft's and ours, "0" means "2.0" as well."""
    base = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 5))).eval()
    method = LoRA(r=2, target_modules=r"0|2\.0", rank_pattern={r"2\.0": 3}, alpha_pattern={r"^0$": 5})
    for chosen in (method, LoRA(r=2, target_modules="0")):
        trained, fresh = train(copy.deepcopy(base), chosen), copy.deepcopy(base)
        save_adapter(trained, tmp_path)
        (tmp_path / "lightning_peft.json").unlink()
        load_adapter(fresh, tmp_path)
        x = torch.randn(3, 5)
        assert_identical(fresh(x), trained(x))
        torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), trained(x))


def test_a_method_that_peft_does_not_have_is_refused_by_peft(tmp_path: Path) -> None:
    base = tiny_models.bert()
    save_adapter(train(copy.deepcopy(base), Combine([LoRA(r=2), IA3()])), tmp_path)
    with pytest.raises(KeyError, match=r"lightning_peft\.Combine"):
        peft.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("part", ["", "bert", "bert.encoder.layer.1"])
def test_what_was_trained_compiled_loads_uncompiled_and_the_other_way_round(part: str, tmp_path: Path) -> None:
    base = tiny_models.bert().eval()
    compiled = copy.deepcopy(base)
    if part:
        compiled.set_submodule(part, torch.compile(compiled.get_submodule(part), backend="eager"))
    else:
        compiled = torch.compile(compiled, backend="eager")
    plain = train(copy.deepcopy(base), LoRA(r=2, target_modules=["query"], modules_to_save=["classifier", "pooler"]))
    save_adapter(plain, tmp_path / "plain")
    load_adapter(compiled, tmp_path / "plain")
    save_adapter(compiled, tmp_path / "compiled")
    for name in ("adapter_model.safetensors", "adapter_config.json", "lightning_peft.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "compiled" / name).read_bytes()
    load_adapter(base, tmp_path / "compiled")
    assert_identical(base(IDS).logits, plain(IDS).logits)


def test_the_dtype_of_the_base_may_be_another_one(tmp_path: Path) -> None:
    base = tiny_models.bert().eval()
    trained = train(copy.deepcopy(base).bfloat16(), LoRA(r=2))
    save_adapter(trained, tmp_path)
    load_adapter(base.bfloat16(), tmp_path)
    assert_identical(base(IDS).logits, trained(IDS).logits)


def test_the_files_say_what_peft_says(tmp_path: Path) -> None:
    model = tiny_models.bert()
    inject(model, LoRA(r=3, alpha=5.0, target_modules=["query"], rank_pattern={r"layer\.1\..*": 2}))
    save_adapter(Wrapper(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    layer = "bert.encoder.layer.{}.attention.self.query"
    assert config["target_modules"] == [layer.format(0), layer.format(1)]
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 5, "SEQ_CLS")
    assert list(config["rank_pattern"].values()) == [2]
    assert config["modules_to_save"] == ["classifier"]
    shapes = {key: list(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        f"base_model.model.{layer.format(0)}.lora_A.weight": [3, 16],
        f"base_model.model.{layer.format(0)}.lora_B.weight": [16, 3],
        f"base_model.model.{layer.format(1)}.lora_A.weight": [2, 16],
        f"base_model.model.{layer.format(1)}.lora_B.weight": [16, 2],
        "base_model.model.classifier.weight": [2, 16],
        "base_model.model.classifier.bias": [2],
    }
