"""Prefix tuning: which attentions are chosen, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from snapshot import Snapshot
from torch import nn

from lightning_peft import PrefixTuning, inject
from lightning_peft.errors import ConfigError, NotApplicableError, PEFTError, TargetError
from lightning_peft.prompting.attention import PrefixedAttention


def _chosen(build: Callable[[], nn.Module], **fields: Any) -> list[str]:
    model = build()
    inject(model, PrefixTuning(num_virtual_tokens=3, **fields))
    return [
        path.partition(".peft.")[0]
        for path, module in model.named_modules()
        if isinstance(module, PrefixedAttention)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "fields", "expected"),
    [
        (tiny_models.gpt2, {}, ["transformer.h.0.attn", "transformer.h.1.attn"]),
        (tiny_models.gpt2, {"layers": [-1]}, ["transformer.h.1.attn"]),
        (tiny_models.gpt2, {"layers": [0, 1], "exclude_modules": ["h.1"]}, ["transformer.h.0.attn"]),
        (tiny_models.gpt2, {"exclude_modules": r"transformer\.h\.0\..*"}, ["transformer.h.1.attn"]),
        (
            tiny_models.bert,
            {"modules_to_save": ["classifier", "layer.0"]},  # what is fully trained gets no prefix
            ["bert.encoder.layer.1.attention.self"],
        ),
    ],
)
def test_the_attentions_that_are_left(build: Callable[[], nn.Module], fields: Any, expected: list[str]) -> None:
    assert _chosen(build, **fields) == expected


def _mamba() -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=4))


def _gpt_neo() -> nn.Module:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 40, "max_position_embeddings": 20}
    return hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]]))


@pytest.mark.parametrize(
    ("build", "fields", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, NotApplicableError, "no attention in Sequential.*Use LoRA"),
        (lambda: nn.LSTM(3, 3), {}, NotApplicableError, "no attention in LSTM"),
        (tiny_models.deberta, {}, NotApplicableError, r"'deberta\.encoder\.layer\.0\.attention'.*a way of its own"),
        (_gpt_neo, {}, NotApplicableError, r"'transformer\.h\.0\.attn\.attention'.*a way of its own"),
        (_mamba, {}, NotApplicableError, r"'backbone\.layers\.0\.mixer' \(MambaMixer\).*a way of its own"),
        (tiny_models.gpt2, {"layers": [7]}, TargetError, "7"),
        (tiny_models.gpt2, {"exclude_modules": ["nowhere"]}, TargetError, "exclude_modules.*'nowhere'"),
        (tiny_models.gpt2, {"exclude_modules": ["attn"]}, TargetError, "exclude_modules, layers and places leave no"),
        (tiny_models.bert, {"modules_to_save": ["bert"]}, TargetError, "leave no attention"),
        (tiny_models.gpt2, {"num_virtual_tokens": 20}, ConfigError, r"20 virtual tokens.*'transformer\.wpe'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_left_alone(
    build: Callable[[], nn.Module], fields: Any, error: type[PEFTError], message: str
) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, PrefixTuning(**{"num_virtual_tokens": 3, **fields}))
    before.assert_same(model)


BAD: dict[str, list[Any]] = {
    "num_virtual_tokens": [0, -1, 1.5, True, None, "3"],
    "prefix_projection": [1, None, "yes"],
    "encoder_hidden_size": [0, 2.0, False, None],
    "init_std": [-0.1, True, "0", None, math.nan, math.inf],
    "places": ["decoder", [], (), ["encoder", "middle"], [1], [[]], None, 3, {"encoder": 1}],
    "gating": [0, None, "no"],
    "exclude_modules": [3, "", [""], [1], {"a": 1}, b"x"],
    "layers": [3, [], [1.0], [True], "1", ["0"]],
    "modules_to_save": [3, "", [""], [None], True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_field_with_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"PrefixTuning\.{name} must be .*, not "):
        PrefixTuning(**{name: value})


def test_its_config_restores_it() -> None:
    method = PrefixTuning(num_virtual_tokens=7, places=("decoder", "cross"), layers=[0], prefix_projection=True)
    config = method.to_config()
    assert config["places"] == ["decoder", "cross"]
    restored = PrefixTuning.from_config(config)
    assert restored.to_config() == config
    torch.manual_seed(1)
    assert len(restored.plan(tiny_models.bart(), []).placements) == len(method.plan(tiny_models.bart(), []).placements)
