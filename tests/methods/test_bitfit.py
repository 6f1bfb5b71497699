"""BitFit against plain torch, and which biases it trains."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from plain_training import (
    Run,
    assert_leaves_no_trace,
    assert_trains_as_plain_torch,
    logits,
    randomise,
    trained,
    translated,
)
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

from lightning_peft import BitFit, inject, merge
from lightning_peft.errors import ConfigError, NotApplicableError, TargetError


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.rnn, self.norm = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True), nn.GroupNorm(2, 10)
        self.head = nn.Linear(10, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(x)[0][:, -1]))


class Attention(nn.Module):
    """Keys and values of other widths: three weights, and one bias for them."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, **widths)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value)[0]


def _cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)


def _called(*shapes: tuple[int, ...]) -> Run:
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    return lambda model: getattr(output := model(*inputs), "logits", output)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    "bert": (tiny_models.bert, logits),
    "gpt2": (tiny_models.gpt2, logits),
    "deberta": (tiny_models.deberta, logits),
    "vit": (tiny_models.vit, _called((2, 3, 8, 8))),
    "bart": (tiny_models.bart, translated),
    "lstm": (lambda: Recurrent(nn.LSTM), _called((3, 4, 6))),
    "gru": (lambda: Recurrent(nn.GRU), _called((3, 4, 6))),
    "attention": (Attention, _called((2, 5, 8), (2, 4, 8), (2, 4, 8))),
    "attention_kdim": (lambda: Attention(kdim=5, vdim=6), _called((2, 5, 8), (2, 4, 5), (2, 4, 6))),
    "encoder": (_encoder, _called((2, 5, 8))),
    "cnn": (_cnn, _called((2, 3, 4, 4))),
    "one layer": (lambda: nn.Linear(4, 3), _called((5, 4))),
}


def _biases(model: nn.Module) -> list[str]:
    """By the papers' rule, the name; bias_k and bias_v of torch's attention are tokens that are attended to."""
    names = [name for name, _ in model.named_parameters() if "bias" in name.rpartition(".")[2]]
    return [name for name in names if name.rpartition(".")[2] not in ("bias_k", "bias_v")]


@pytest.mark.parametrize("name", NETWORKS)
def test_training_is_that_of_the_biases_themselves(name: str) -> None:
    build, run = NETWORKS[name]
    model = build()
    assert_trains_as_plain_torch(model, BitFit(modules_to_save=None, target_modules=".*"), _biases(model), run)


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_the_base_has_the_trained_biases_and_is_else_what_it_was(name: str) -> None:
    build, run = NETWORKS[name]
    model = build()
    names, before = _biases(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    inject(model.eval(), BitFit(modules_to_save=None, target_modules=".*"))
    trained(model, run)
    expected = run(model)
    merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(names)


@pytest.mark.parametrize("name", ["bert", "lstm", "attention_kdim", "encoder"])
def test_disabled_and_removed_every_bit_of_the_base_is_back(name: str) -> None:
    build, run = NETWORKS[name]
    assert_leaves_no_trace(build(), BitFit(), run)


def test_the_task_head_is_trained_whole_and_not_by_its_bias() -> None:
    model = tiny_models.bert()
    report = inject(model, BitFit())
    assert {row.adapter_type for row in report.hosts if row.host != "classifier"} == {"BitFit"}
    assert [(r.adapter_type, r.trainable) for r in report.hosts if r.host == "classifier"] == [("fully trained", 34)]


def test_a_task_head_that_is_not_trained_whole_stays_as_it_is() -> None:
    report = inject(tiny_models.bert(), BitFit(modules_to_save=None))
    assert not [row for row in report.hosts if row.host.startswith("classifier")]


def test_the_head_of_a_language_model_is_pretrained_and_trains_its_bias_once() -> None:
    """The head holds its bias under two names."""
    model = tiny_models.bert(hf.BertForMaskedLM)
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    assert_trains_as_plain_torch(model, BitFit(), _biases(model), logits)
    expected = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias


@pytest.mark.parametrize(
    ("build", "fields", "expected"),
    [
        (tiny_models.bert, {"target_modules": ["query", "intermediate.dense"]}, 2 * (16 + 24)),
        (tiny_models.bert, {"target_modules": ["pooler"]}, 16),
        (tiny_models.bert, {"target_modules": ["attention"]}, 2 * 4 * 16),
        (tiny_models.bert, {"target_modules": ["layer.1"]}, 4 * 16 + 16 + 24 + 16 + 16),
        (tiny_models.bert, {"target_modules": "norm"}, 5 * 16),
        (tiny_models.bert, {"target_modules": r".*\.0\..*(key|value)"}, 2 * 16),
        (tiny_models.bert, {"target_modules": ["ffn-output", "embeddings.LayerNorm"]}, 2 * 16 + 16),
        (tiny_models.bert, {"layers": [-1]}, 4 * 16 + 16 + 24 + 16 + 16),
        (tiny_models.bert, {"layers": [0, 1], "exclude_modules": ["norm", "attention"]}, 2 * (24 + 16)),
        (tiny_models.bert, {"exclude_modules": ["encoder"]}, 16 + 16),
        (tiny_models.gpt2, {"target_modules": ["attention"]}, 2 * (3 * 16 + 16)),
        (_encoder, {"target_modules": ["self_attn"], "layers": [0]}, 3 * 8 + 8),
        (_encoder, {"target_modules": ["in_proj"]}, 2 * 3 * 8),
        (lambda: Recurrent(nn.LSTM), {"target_modules": ["rnn"]}, 2 * 2 * 2 * 4 * 5),
    ],
)
def test_fields_choose_the_biases(build: Callable[[], nn.Module], fields: dict[str, Any], expected: int) -> None:
    report = inject(build(), BitFit(modules_to_save=None, **fields))
    assert report.trainable == expected


def test_of_a_bias_that_three_weights_share_only_the_named_parts_train() -> None:
    model, run = Attention(kdim=5, vdim=6), _called((2, 5, 8), (2, 4, 5), (2, 4, 6))
    randomise(model)
    before = model.attention.in_proj_bias.detach().clone()
    report = inject(model, BitFit(target_modules=["q_proj", "v_proj"]))
    assert report.trainable == 16
    trained(model, run)
    expected = run(model)
    merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    moved = model.attention.in_proj_bias != before
    assert moved.tolist() == [True] * 8 + [False] * 8 + [True] * 8


def test_the_parts_of_a_shared_bias_together_are_the_whole() -> None:
    model = Attention(kdim=5, vdim=6)
    inject(model, BitFit(target_modules=["q_proj", "k_proj", "v_proj"]))
    assert model.attention.peft.default.in_proj_bias.shape == (24,)


def test_beside_a_bf16_base_biases_train_in_full_precision() -> None:
    model = tiny_models.bert().bfloat16().eval()
    inject(model, BitFit())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    value = model.bert.pooler.dense.peft.default.bias
    start = value.detach().clone()
    with torch.no_grad():
        value.add_(1e-4)  # less than bf16 can tell from the value itself
    assert not torch.equal(value, start)
    assert logits(model).dtype == torch.bfloat16


def test_running_statistics_stay_while_the_bias_of_a_batchnorm_trains() -> None:
    model = _cnn().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inject(model, BitFit())
    trained(model, _called((2, 3, 4, 4)))
    for name, buffer in before.items():
        assert_identical(model.get_buffer(name), buffer, name)


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.t5])
def test_a_model_without_biases_is_refused(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=r"BitFit: \w+ has no bias to train\. Choose another method"):
        inject(model, BitFit())
    before.assert_same(model)


@pytest.mark.parametrize(
    ("build", "fields", "error", "message"),
    [
        (tiny_models.bert, {"target_modules": ["qurey"]}, TargetError, r"'qurey' matches no layer .*mean 'query'"),
        (tiny_models.bert, {"target_modules": ["word_embeddings"]}, NotApplicableError, "none has any bias. Leave it"),
        (tiny_models.bert, {"target_modules": ["classifier"]}, TargetError, "'classifier' is fully trained already"),
        (tiny_models.bert, {"target_modules": ["("]}, TargetError, "neither the name of a layer nor a regular exp"),
        (tiny_models.bert, {"exclude_modules": ["poler"]}, TargetError, "exclude_modules: 'poler' matches nothing"),
        (tiny_models.bert, {"layers": [2]}, TargetError, r"there is no layer 2. Numbered layers .*\(0 to 1\)"),
        (tiny_models.bert, {"target_modules": ["query"], "exclude_modules": ["self"]}, TargetError, "nothing is left"),
        (
            tiny_models.gpt2,
            {"target_modules": ["query"]},
            TargetError,
            "share one weight, as in '.*c_attn'.*role 'attention'",
        ),
        (_encoder, {"target_modules": ["value"]}, TargetError, "share one weight, as in '.*in_proj'"),
        (_cnn, {"target_modules": ["embedding"]}, TargetError, "'embedding' matches no layer"),
    ],
)
def test_what_does_not_fit_is_an_error_that_helps_and_changes_nothing(
    build: Callable[[], nn.Module], fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, BitFit(**fields))
    before.assert_same(model)


def test_fields_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"BitFit\.target_modules must be a non-empty string or a list of them"):
        BitFit(target_modules=3)
    with pytest.raises(ConfigError, match=r"BitFit\.layers must be a list of layer indices"):
        BitFit(layers=["1"])
