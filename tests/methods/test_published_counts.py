"""The counts of trainable parameters that papers and leaderboards print.

Every model is built on the meta device, so nothing is allocated.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_peft import (
    IA3,
    BitFit,
    BottleneckAdapter,
    DoRA,
    LayerNormTuning,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    inject,
    remove,
)

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


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


def _gpt3_projections() -> nn.Module:
    """Of GPT-3, whose weights are not public, the two projections of each layer that LoRA adapts."""
    d, layers = 12288, 96
    return nn.ModuleList([nn.ModuleDict({"q": nn.Linear(d, d), "v": nn.Linear(d, d)}) for _ in range(layers)])


BASES: dict[str, Callable[[], nn.Module]] = {
    "BERT-base": lambda: hf.BertModel(hf.BertConfig(**BASE)),
    "BERT-large": lambda: hf.BertModel(hf.BertConfig(**LARGE)),
    "RoBERTa-base": lambda: hf.RobertaModel(hf.RobertaConfig(vocab_size=50265, **BASE)),
    "RoBERTa-large": lambda: hf.RobertaModel(hf.RobertaConfig(vocab_size=50265, **LARGE)),
    "DeBERTa-v2-XXL": lambda: _deberta(
        hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144
    ),
    "DeBERTa-v3-base": lambda: _deberta(**BASE),
    "GPT-3": lambda: hf.GPT2Model(hf.GPT2Config(n_embd=12288, n_layer=96, n_head=96)),
    "GPT-3, q and v": _gpt3_projections,
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
    "T5-XL": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=2048, num_heads=32, d_ff=5120, num_layers=24, feed_forward_proj="gated-gelu")
    ),
}

QV, GPT3_QV = ["query", "value"], ["q", "v"]
QKVUD = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PREFIX_MLP = {"prefix_projection": True, "encoder_hidden_size": 512}
PEFT = "PEFT, MetaMathQA"  # its method comparison
HUB = "AdapterHub"  # its formulas
PUBLISHED = [
    # source and the figure it prints, base, method, trainable parameters, percent of all
    ("LoRA, table 2: 0.3M", "RoBERTa-base", LoRA(r=8, target_modules=QV), 294_912, None),
    ("LoRA, table 2: 0.8M", "RoBERTa-large", LoRA(r=8, target_modules=QV), 786_432, None),
    ("LoRA, table 2: 4.7M", "DeBERTa-v2-XXL", LoRA(r=16, target_modules=QV), 4_718_592, None),
    ("LoRA, table 4: 4.7M", "GPT-3, q and v", LoRA(r=1, target_modules=GPT3_QV), 4_718_592, None),
    ("LoRA, table 4: 37.7M", "GPT-3, q and v", LoRA(r=8, target_modules=GPT3_QV), 37_748_736, None),
    ("DoRA, table 1: 0.83 %", "LLaMA-7B", LoRA(r=32, target_modules=QKVUD), 56_098_816, 0.826),
    ("DoRA, table 1: 0.67 %", "LLaMA-13B", LoRA(r=32, target_modules=QKVUD), 87_818_240, 0.670),
    ("DoRA, table 1: 0.70 %", "Llama-3-8B", LoRA(r=32, target_modules=QKVUD), 56_623_104, 0.700),
    ("DoRA, table 1: 0.84 %", "LLaMA-7B", DoRA(r=32, target_modules=QKVUD), 56_975_360, 0.838),
    ("DoRA, table 1: 0.43 %", "LLaMA-7B", DoRA(r=16, target_modules=QKVUD), 28_925_952, 0.427),
    ("DoRA, table 1: 0.68 %", "LLaMA-13B", DoRA(r=32, target_modules=QKVUD), 89_190_400, 0.681),
    ("DoRA, table 1: 0.71 %", "Llama-3-8B", DoRA(r=32, target_modules=QKVUD), 57_409_536, 0.710),
    ("VeRA: 159.9M", "LLaMA-7B", LoRA(r=64), 159_907_840, None),
    ("VeRA: 250.3M", "LLaMA-13B", LoRA(r=64), 250_347_520, None),
    ("AdaLoRA, table 1: 1.33M", "DeBERTa-v3-base", LoRA(r=8, target_modules=["attention", "ffn"]), 1_327_104, None),
    ("AdaLoRA, table 1: 0.33M", "DeBERTa-v3-base", LoRA(r=2), 331_776, None),
    (PEFT, "Llama-3.2-3B", LoRA(r=32, target_modules=QV), 9_175_040, None),
    (PEFT, "Llama-3.2-3B", DoRA(r=32, target_modules=["q_proj", "v_proj"]), 9_289_728, None),
    (PEFT, "Llama-3.2-3B", LoRA(r=10, target_modules="ffn"), 9_461_760, None),
    ("LoRA, table 4: 7.1M", "GPT-3", BottleneckAdapter(preset="houlsby", width=1), 7_078_080, None),
    ("LoRA, table 4: 40.1M", "GPT-3", BottleneckAdapter(preset="houlsby", width=8), 40_109_568, None),
    ("LoRA, table 2: 0.8M", "RoBERTa-large", BottleneckAdapter(preset="pfeiffer", width=16), 811_392, None),
    ("LoRA, table 2: 0.8M", "RoBERTa-large", BottleneckAdapter(preset="houlsby", width=8), 835_968, None),
    (HUB, "BERT-base", BottleneckAdapter(preset="pfeiffer", reduction_factor=16), 894_528, None),
    (HUB, "BERT-base", BottleneckAdapter(preset="houlsby", reduction_factor=16), 1_789_056, None),
    (HUB, "BERT-base", BottleneckAdapter(preset="parallel", reduction_factor=2), 7_091_712, None),
    (HUB, "BERT-base", PrefixTuning(num_virtual_tokens=30, **PREFIX_MLP), 9_872_384, None),
    (HUB, "BERT-base", PrefixTuning(num_virtual_tokens=30), 552_960, None),
    ("ReFT: 0.039 %", "LLaMA-7B", PrefixTuning(num_virtual_tokens=10), 2_621_440, 0.039),
    ("ReFT: 0.031 %", "LLaMA-13B", PrefixTuning(num_virtual_tokens=10), 4_096_000, 0.031),
    (PEFT, "Llama-3.2-3B", PrefixTuning(num_virtual_tokens=200), 11_468_800, None),
    ("Lester et al.: P x 2048", "T5-XL", PromptTuning(num_virtual_tokens=100), 204_800, None),
    (PEFT, "Llama-3.2-3B", PromptTuning(num_virtual_tokens=200), 614_400, None),
    (PEFT, "Llama-3.2-3B", PTuning(num_virtual_tokens=20, encoder="mlp", encoder_hidden_size=3072), 28_382_208, None),
    ("BitFit: 0.09 %", "BERT-base", BitFit(), 102_912, 0.094),
    ("BitFit: 0.08 %", "BERT-large", BitFit(), 272_384, 0.081),
    ("BitFit: b_q and b_m2", "BERT-base", BitFit(target_modules=["query", "intermediate.dense"]), 46_080, None),
    ("T-Few: 540K", "T5-XL", IA3(), 540_672, None),
    (HUB, "BERT-base", IA3(), 55_296, None),
    (PEFT, "Llama-3.2-3B", IA3(), 286_720, None),
    ("T-Few: 250K", "T5-XL", LayerNormTuning(), 249_856, None),
    (PEFT, "Llama-3.2-3B", LayerNormTuning(), 175_104, None),
]


@cache
def _base(name: str) -> nn.Module:
    with torch.device("meta"):
        return BASES[name]()


@pytest.mark.parametrize(
    ("source", "base", "method", "trainable", "percent"),
    PUBLISHED,
    ids=[f"{type(row[2]).__name__}-{row[1]}-{row[3]}" for row in PUBLISHED],
)
def test_as_many_parameters_train_as_published(
    source: str, base: str, method: Method, trainable: int, percent: float | None
) -> None:
    model = _base(base)
    report = inject(model, replace(method, modules_to_save=None))
    try:
        assert report.trainable == trainable, source
        assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert report.left_out == ()
        if percent is not None:
            assert 100 * report.share == pytest.approx(percent, abs=0.001), source
    finally:
        remove(model)
