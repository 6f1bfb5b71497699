"""Combine: several methods as one adapter."""

import copy
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny_models
import torch
import yaml
from perturbation import adapted, perturb
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    IA3,
    BitFit,
    BottleneckAdapter,
    Combine,
    LoRA,
    PEFTCallback,
    PrefixTuning,
    PromptTuning,
    disabled,
    inject,
    load_from_checkpoint,
    remove,
)
from lightning_peft.checkpoints.ckpt import adapter_state
from lightning_peft.cli.parser import main
from lightning_peft.core.method import Method
from lightning_peft.errors import ConfigError

ROOT = Path(__file__).parents[2]
IDS = torch.arange(1, 11).view(2, 5)


def lora_and_prompt(**fields: Any) -> Combine:
    return Combine([LoRA(r=2, rank_pattern={"query": 4}), PromptTuning(num_virtual_tokens=3)], **fields)


METHODS = {"list": lora_and_prompt(), "mam": Combine(preset="mam"), "unipelt": Combine(preset="unipelt")}


def combined(method: Method, **fields: Any) -> nn.Module:
    torch.manual_seed(1)
    return adapted(tiny_models.bert(**fields), method)


class Task(L.LightningModule):
    """A user's module."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = tiny_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch), batch[:, 0] % 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def test_a_list_of_methods_trains_saves_and_loads(tmp_path: Path) -> None:
    task = Task()
    before = Snapshot(task.net)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=12, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, default_root_dir=tmp_path,
        callbacks=[PEFTCallback(lora_and_prompt(), show=False)],
    )  # fmt: skip
    losses: list[float] = []
    task.on_train_batch_end = lambda outputs, *args: losses.append(outputs["loss"].item())
    trainer.fit(task, DataLoader([IDS], batch_size=None))
    assert losses[-1] < losses[0]
    task.eval()
    keys = adapter_state(task).keys()
    assert {key.partition("default:")[2][0] for key in keys if "default:" in key} == {"0", "1"}
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    saved = torch.load(tmp_path / "task.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == keys
    assert saved["lightning_peft"]["adapters"][":default"]["method"] == lora_and_prompt().to_config()
    loaded = load_from_checkpoint(Task, tmp_path / "task.ckpt").eval()
    torch.testing.assert_close(loaded(IDS), task(IDS), rtol=0, atol=1e-6)
    remove(task)
    before.assert_same(task.net.train())


def test_a_report_names_the_method_of_each_adapter() -> None:
    methods = [LoRA(r=2, target_modules=["query"]), BitFit(), LoRA(r=3), BottleneckAdapter(preset="pfeiffer")]
    rows = inject(tiny_models.bert(), Combine(methods)).hosts
    query = [(row.adapter_type, row.trainable) for row in rows if row.host.endswith("1.attention.self.query")]
    assert query == [("LoRA", 64), ("BitFit", 16), ("LoRA", 96)]
    assert {row.adapter_type for row in rows if row.host_type == "LayerNorm"} == {"BitFit", "BottleneckAdapter"}
    report = inject(tiny_models.bert(max_position_embeddings=40), Combine(preset="mam"))
    assert {row.adapter_type for row in report.hosts} == {"PrefixTuning", "BottleneckAdapter", "fully trained"}
    assert "Combine" not in str(report)


def test_the_adapters_state_fits_into_a_fresh_model() -> None:
    model = combined(lora_and_prompt())
    file = io.BytesIO()
    torch.save(adapter_state(model), file)
    file.seek(0)
    fresh = perturb(combined(lora_and_prompt()))
    assert not torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_identical(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_copy_computes_the_same_with_its_own_parts(method: Combine, how: Callable[[Any], Any]) -> None:
    model = combined(method, max_position_embeddings=40)  # room for the text beside 30 virtual tokens
    expected = model(input_ids=IDS).logits
    duplicate = how(model)
    assert_identical(duplicate(input_ids=IDS).logits, expected)
    perturb(model)
    assert not torch.equal(model(input_ids=IDS).logits, expected)
    assert_identical(duplicate(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_disabled_and_removed_nothing_is_left(method: Combine) -> None:
    model = tiny_models.bert(max_position_embeddings=40).eval()
    before, expected = Snapshot(model), model(input_ids=IDS).logits
    inject(model, method)
    perturb(model)
    assert (model(input_ids=IDS).logits - expected).abs().max() > 1e-3
    with disabled(model):
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    model(input_ids=IDS).logits.sum().backward()
    remove(model)
    before.assert_same(model)
    assert_identical(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    "method",
    [
        lora_and_prompt(modules_to_save=["classifier"]),
        Combine((LoRA(target_modules=["query"], layers=[-1]), IA3(), BitFit()), modules_to_save=None),
        Combine([BottleneckAdapter(preset="pfeiffer", scale="channel"), PrefixTuning(places=["encoder"])]),
    ],
    ids=["lora_prompt", "three", "adapter_prefix"],
)
def test_a_config_holds_every_part_in_primitives(method: Combine) -> None:
    config = yaml.safe_load(yaml.safe_dump(method.to_config()))
    again = Method.from_config(config)
    assert again.to_config() == method.to_config()
    assert list(again.methods) == [Method.from_config(part.to_config()) for part in method.methods]
    assert again.modules_to_save == method.modules_to_save
    assert config["preset"] is None


def test_a_config_with_an_unknown_part_or_field_is_an_error() -> None:
    config = lora_and_prompt().to_config()
    for change, message in {"method": "There is no method 'LORA'.*'LoRA'", "rank": "LoRA has no field 'rank'"}.items():
        parts = [{**config["methods"][0], change: "LORA"}, config["methods"][1]]
        with pytest.raises(ConfigError, match=message):
            Method.from_config({**config, "methods": parts})
    with pytest.raises(ConfigError, match=r"LoRA\.r must be at least 1"):
        Method.from_config({**config, "methods": [{"method": "LoRA", "r": 0}, {"method": "IA3"}]})


PARTS = """
class_path: Combine
init_args:
  modules_to_save: [classifier]
  methods:
    - class_path: LoRA
      init_args: {r: 2, target_modules: [query]}
    - class_path: lightning_peft.methods.PromptTuning
      init_args: {num_virtual_tokens: 3}
"""


def test_the_command_line_takes_a_list_of_methods_from_a_file(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    (tmp_path / "method.yaml").write_text(PARTS)
    (tmp_path / "again.yaml").write_text("class_path: Combine\ninit_args: {preset: unipelt}\n")
    shown = {}
    for name in ("method", "again"):
        command = ["fit", "--config", "configs/quickstart.yaml", "--peft.method", str(tmp_path / f"{name}.yaml")]
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--print_config"])
        shown[name] = yaml.safe_load(capsys.readouterr().out)["peft"]["method"]
    parts = shown["method"]["init_args"]["methods"]
    assert [part["class_path"].rpartition(".")[2] for part in parts] == ["LoRA", "PromptTuning"]
    assert (parts[0]["init_args"]["r"], parts[1]["init_args"]["num_virtual_tokens"]) == (2, 3)
    assert shown["method"]["init_args"]["modules_to_save"] == ["classifier"]
    assert shown["again"]["init_args"]["preset"] == "unipelt"
