"""The counts of trainable parameters that papers and leaderboards print for LoRA.

Every model is built on the meta device, so nothing is allocated.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_peft import LoRA, inject, remove


def _roberta(**sizes: int) -> nn.Module:
    return hf.RobertaModel(hf.RobertaConfig(vocab_size=50265, **sizes))


def _llama(vocab_size: int = 32000, **sizes: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=vocab_size, **sizes))


def _deberta(**sizes: int) -> nn.Module:
    fields = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 256,
    }
    return hf.DebertaV2Model(hf.DebertaV2Config(vocab_size=128100, position_biased_input=False, **fields, **sizes))


def _gpt3() -> nn.Module:
    """Of GPT-3, whose weights are not public, the two projections of each layer that LoRA adapts."""
    d, layers = 12288, 96
    return nn.ModuleList([nn.ModuleDict({"q": nn.Linear(d, d), "v": nn.Linear(d, d)}) for _ in range(layers)])


BASES: dict[str, Callable[[], nn.Module]] = {
    "RoBERTa-base": lambda: _roberta(hidden_size=768, num_hidden_layers=12, intermediate_size=3072),
    "RoBERTa-large": lambda: _roberta(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "DeBERTa-v2-XXL": lambda: _deberta(
        hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144
    ),
    "DeBERTa-v3-base": lambda: _deberta(hidden_size=768, num_hidden_layers=12, intermediate_size=3072),
    "GPT-3": _gpt3,
    "LLaMA-7B": lambda: _llama(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008),
    "LLaMA-13B": lambda: _llama(
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824
    ),
    "Llama-3-8B": lambda: _llama(
        128256, hidden_size=4096, num_hidden_layers=32, num_key_value_heads=8, intermediate_size=14336
    ),
    "Llama-3.2-3B": lambda: _llama(
        128256,
        hidden_size=3072,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        intermediate_size=8192,
        tie_word_embeddings=True,
    ),
}

DORA = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PUBLISHED = [
    # base, rank, targets, trainable parameters, percent of all, source
    ("RoBERTa-base", 8, ["query", "value"], 294_912, None, "LoRA, table 2: 0.3M"),
    ("RoBERTa-large", 8, ["query", "value"], 786_432, None, "LoRA, table 2: 0.8M"),
    ("DeBERTa-v2-XXL", 16, ["query", "value"], 4_718_592, None, "LoRA, table 2: 4.7M"),
    ("GPT-3", 1, ["q", "v"], 4_718_592, None, "LoRA, table 4: 4.7M"),
    ("GPT-3", 8, ["q", "v"], 37_748_736, None, "LoRA, table 4: 37.7M"),
    ("LLaMA-7B", 32, DORA, 56_098_816, 0.826, "DoRA, table 1: 0.83 %"),
    ("LLaMA-13B", 32, DORA, 87_818_240, 0.670, "DoRA, table 1: 0.67 %"),
    ("Llama-3-8B", 32, DORA, 56_623_104, 0.700, "DoRA, table 1: 0.70 %"),
    ("LLaMA-7B", 64, "all-linear", 159_907_840, None, "VeRA: 159.9M"),
    ("LLaMA-13B", 64, "all-linear", 250_347_520, None, "VeRA: 250.3M"),
    ("DeBERTa-v3-base", 8, ["attention", "ffn"], 1_327_104, None, "AdaLoRA, table 1: 1.33M"),
    ("DeBERTa-v3-base", 2, "all-linear", 331_776, None, "AdaLoRA, table 1: 0.33M"),
    ("Llama-3.2-3B", 32, ["query", "value"], 9_175_040, None, "PEFT's MetaMathQA comparison"),
    ("Llama-3.2-3B", 10, "ffn", 9_461_760, None, "PEFT's MetaMathQA comparison"),
]


@cache
def _base(name: str) -> nn.Module:
    with torch.device("meta"):
        return BASES[name]()


@pytest.mark.parametrize(
    ("base", "r", "targets", "trainable", "percent", "source"), PUBLISHED, ids=[f"{p[0]}-r{p[1]}" for p in PUBLISHED]
)
def test_as_many_parameters_train_as_published(
    base: str, r: int, targets: list[str] | str, trainable: int, percent: float | None, source: str
) -> None:
    model = _base(base)
    report = inject(model, LoRA(r=r, target_modules=targets, modules_to_save=None))
    try:
        assert report.trainable == trainable, source
        assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert report.left_out == ()
        if percent is not None:
            assert 100 * report.share == pytest.approx(percent, abs=0.001), source
    finally:
        remove(model)
