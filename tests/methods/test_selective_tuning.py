"""Selective tuning: which parameters are chosen, and that they train as they would in plain torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny_models
import torch
from plain_training import IDS, assert_trains_as_plain_torch, logits, trained, translated
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    Method,
    PEFTCallback,
    SelectiveTuning,
    active,
    disabled,
    inject,
    load_from_checkpoint,
    merge,
    remove,
)

BLOCK = 4 * (16 * 16 + 16) + 2 * 16 * 24 + 24 + 16 + 4 * 16
EMBEDDINGS = (40 + 20 + 2) * 16


class Vision(nn.Module):
    """A network of plain torch, with parameters of its own and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.token = nn.Parameter(torch.randn(1, 4))
        self.scales = nn.ParameterList([torch.randn(4), torch.randn(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).flatten(2).mean(2) + self.token
        return self.head(torch.tanh(x * self.scales[0]) + self.scales[1])


def _image(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 96).sin().view(2, 3, 4, 4))


CHOICES: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    # fields for BERT, and the names that they mean
    "last block": ({"layers": [-1]}, lambda n: ".layer.1." in n),
    "both blocks": ({"layers": [-2, -1]}, lambda n: ".layer." in n),
    "names": ({"target_modules": ["query", "pooler"]}, lambda n: ".query." in n or ".pooler." in n),
    "role": ({"target_modules": ["attention-output"]}, lambda n: "attention.output.dense" in n),
    "word": ({"target_modules": "norm"}, lambda n: "LayerNorm" in n),
    "words": ({"target_modules": ["norm", "embedding"]}, lambda n: "LayerNorm" in n or "_embeddings." in n),
    "expression": ({"target_modules": r".*\.1\..*value"}, lambda n: ".layer.1.attention.self.value" in n),
    "exclusion": ({"exclude_modules": ["encoder", "norm"]}, lambda n: "_embeddings" in n or "pooler" in n),
    "weights": (
        {"parameter_types": ["weight"]},
        lambda n: n.endswith("weight") and "_emb" not in n and "Norm" not in n,
    ),
    "biases": ({"parameter_types": ["bias"]}, lambda n: n.endswith("bias")),
    "norms": ({"parameter_types": ["norm"]}, lambda n: "LayerNorm" in n),
    "embeddings": ({"parameter_types": ["embedding"]}, lambda n: "_embeddings" in n),
    "two kinds": ({"parameter_types": ["bias", "embedding"]}, lambda n: n.endswith("bias") or "_embeddings" in n),
    "suffix": ({"parameters": ["query.weight"]}, lambda n: n.endswith("query.weight")),
    "end": ({"parameters": [r"layer\.0\..*bias", "pooler.dense.weight"]}, lambda n: "pooler.dense.w" in n or "0" in n),
    "narrowed": (
        {"target_modules": ["attention"], "layers": [0], "parameter_types": ["weight"], "exclude_modules": ["key"]},
        lambda n: ".layer.0.attention" in n and n.endswith("weight") and "key" not in n and "Norm" not in n,
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_fields_choose_parameters_which_train_as_they_are(case: str) -> None:
    fields, chosen = CHOICES[case]
    model = tiny_models.bert()
    names = [n for n, _ in model.named_parameters() if chosen(n) and not n.startswith("classifier")]
    if case == "end":
        names = [n for n in names if (n.endswith("bias") and ".layer.0." in n) or "pooler.dense.weight" in n]
    assert_trains_as_plain_torch(model, SelectiveTuning(modules_to_save=None, **fields), names, logits)
    expected = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"layers": [-1]}, BLOCK),
        ({"layers": [-2, -1]}, 2 * BLOCK),
        ({"parameter_types": ["embedding"]}, EMBEDDINGS),
        ({"exclude_modules": ["encoder", "pooler"]}, EMBEDDINGS + 32),
        ({"target_modules": ["word_embeddings"], "token_ids": [3, 1]}, 2 * 16),
    ],
)
def test_as_many_train_as_are_chosen_and_the_head_beside_them(fields: dict[str, Any], count: int) -> None:
    report = inject(tiny_models.bert(), SelectiveTuning(**fields))
    assert report.trainable == count + 34
    kinds = {row.host: row.adapter_type for row in report.hosts}
    assert kinds.pop("classifier") == "fully trained"
    assert set(kinds.values()) == {"SelectiveTuning"}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"target_modules": ["conv"]}, ["conv.weight", "conv.bias"]),
        ({"parameters": ["token"]}, ["token"]),
        ({"parameters": [r"scales\.\d"]}, ["scales.0", "scales.1"]),
        ({"target_modules": ["scales"], "parameters": ["1"]}, ["scales.1"]),
        ({"parameter_types": ["weight"]}, ["conv.weight", "head.weight", "token"]),
        ({"exclude_modules": ["conv", "head"]}, ["norm.weight", "norm.bias", "token", "scales.0", "scales.1"]),
    ],
)
def test_parameters_outside_of_layers_train_too(fields: dict[str, Any], names: list[str]) -> None:
    model = assert_trains_as_plain_torch(Vision(), SelectiveTuning(**fields), names, _image)
    expected = _image(model)
    merge(model)
    torch.testing.assert_close(_image(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.t5, tiny_models.bart])
def test_a_tied_table_trains_as_one(build: Callable[[], nn.Module]) -> None:
    model = build()
    run = logits if build is tiny_models.llama else translated
    table = model.get_input_embeddings().weight
    assert model.lm_head.weight is table
    tables = [n for n, p in model.named_parameters() if p.dim() == 2 and ("embed" in n or "shared" in n or "bias" in n)]
    assert_trains_as_plain_torch(model, SelectiveTuning(parameter_types=["embedding"]), tables, run)
    expected = run(model)
    merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_tied_table_trains_at_one_place_where_the_other_is_excluded() -> None:
    model = tiny_models.llama()
    inject(model, SelectiveTuning(target_modules=["embed_tokens"], exclude_modules=["lm_head"]))
    assert "peft" not in model.lm_head._modules
    assert "peft" in model.model.embed_tokens._modules


def test_it_survives_being_written_down() -> None:
    method = SelectiveTuning(layers=[-1], parameters=["x"], parameter_types=["bias"], token_ids=[2, 1], density=0.5)
    assert Method.from_config(method.to_config()) == method


PARTIAL: dict[str, dict[str, Any]] = {
    "entries": {"density": 0.2},
    "rows": {"token_ids": [5, 9]},
    "whole": {"layers": [0]},
    "all at once": {"token_ids": [5, 9], "density": 0.2, "parameters": [".*"]},
}


@pytest.mark.parametrize("case", PARTIAL)
def test_two_adapters_replace_each_other_and_leave_no_trace(case: str) -> None:
    model = tiny_models.llama().eval()
    method = SelectiveTuning(**PARTIAL[case])
    before, base = Snapshot(model), logits(model).detach()
    outputs = {}
    for name in "ab":
        inject(model, method, name)
        with active(model, name):
            trained(model, logits, steps=2 if name == "a" else 4)
            outputs[name] = logits(model).detach()
    assert (outputs["a"] - outputs["b"]).abs().max() > 1e-3
    for name in "ab":
        with active(model, name), torch.no_grad():
            torch.testing.assert_close(logits(model), outputs[name], rtol=1e-5, atol=1e-6)  # no_grad has other kernels
    with disabled(model):
        torch.testing.assert_close(logits(model), base)
    remove(model, "a")
    torch.testing.assert_close(logits(model), outputs["b"])
    remove(model, "b")
    before.assert_same(model)


@pytest.mark.parametrize("case", PARTIAL)
def test_beside_a_bf16_base_they_train_in_full_precision(case: str) -> None:
    model = tiny_models.llama().bfloat16().eval()
    expected = logits(model)
    inject(model, SelectiveTuning(**PARTIAL[case]))
    torch.testing.assert_close(logits(model), expected)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trained(model, logits)
    assert logits(model).dtype == torch.bfloat16
    merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Task(L.LightningModule):
    """A LightningModule that knows nothing of adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = tiny_models.llama(tie_word_embeddings=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize("fields", [*PARTIAL.values(), {"density": 0.1, "score": "fisher", "score_batches": 3}])
def test_a_trainer_trains_saves_and_loads_it(fields: dict[str, Any], tmp_path: Path) -> None:
    task, data = Task(), DataLoader([IDS] * 6, batch_size=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    callback = PEFTCallback(SelectiveTuning(**fields), show=False)
    trainer = L.Trainer(callbacks=[callback], max_epochs=1, enable_checkpointing=False, **quiet)
    before = Snapshot(task)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    loaded = load_from_checkpoint(Task, tmp_path / "task.ckpt")
    found = logits(task.net.eval())
    assert_identical(logits(loaded.net.eval()), found)
    with disabled(task):
        assert (logits(task.net) - found).abs().max() > 1e-3
    for name, tensor in before.state.items():
        assert_identical(task.state_dict()[name], tensor, name)
