"""The blocks of a transformer, found from where its linear layers sit."""

from collections.abc import Callable

import pytest
import tiny_models
import torch
import transformers as hf
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.network.blocks import Block, find_blocks
from lightning_peft.network.hosts import find_hosts

SIZES = {**tiny_models.SIZES, **tiny_models.TOKENS}


def blocks(model: nn.Module) -> list[Block]:
    return find_blocks(list(find_hosts(model)))


def shown(block: Block) -> tuple[str, ...]:
    """Each attention as "path: its linear layers -> its output", and the feedforward layers; from the block."""

    def below(*names: str) -> str:
        return " ".join(name.removeprefix(f"{block.path}.") for name in names)

    return (
        *(f"{below(a.path)}: {below(*a.linears)} -> {below(a.output)}" for a in block.attentions),
        below(*block.ffn),
    )


def wavlm() -> nn.Module:
    layers = {"conv_dim": [8], "conv_stride": [5], "conv_kernel": [10], "num_feat_extract_layers": 1}
    return hf.WavLMModel(hf.WavLMConfig(**SIZES, **layers, num_conv_pos_embedding_groups=2))


_BERT = "attention.self.query attention.self.key attention.self.value"
_GLOBAL = "attention.self.query_global attention.self.key_global attention.self.value_global"
_IN_OUT = "{0}: {0}.in_proj {0}.out_proj -> {0}.out_proj"

MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "bert": (
        tiny_models.bert,
        "bert.encoder.layer.{}",
        (f"attention: {_BERT} attention.output.dense -> attention.output.dense", "intermediate.dense output.dense"),
    ),
    "gpt2": (
        tiny_models.gpt2,
        "transformer.h.{}",
        ("attn: attn.c_attn attn.c_proj -> attn.c_proj", "mlp.c_fc mlp.c_proj"),
    ),
    "phi3": (
        lambda: hf.Phi3Model(hf.Phi3Config(**SIZES, num_key_value_heads=1)),
        "layers.{}",
        ("self_attn: self_attn.o_proj self_attn.qkv_proj -> self_attn.o_proj", "mlp.gate_up_proj mlp.down_proj"),
    ),
    "gpt_neox": (
        lambda: hf.GPTNeoXModel(hf.GPTNeoXConfig(**SIZES)),
        "layers.{}",
        (
            "attention: attention.query_key_value attention.dense -> attention.dense",
            "mlp.dense_h_to_4h mlp.dense_4h_to_h",
        ),
    ),
    "torch_decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12), 2),
        "layers.{}",
        (_IN_OUT.format("self_attn"), _IN_OUT.format("multihead_attn"), "linear1 linear2"),
    ),
    "longformer": (  # projections of tokens that attend to all are not its output
        lambda: hf.LongformerModel(hf.LongformerConfig(**SIZES, attention_window=4)),
        "encoder.layer.{}",
        (
            f"attention: {_BERT} {_GLOBAL} attention.output.dense -> attention.output.dense",
            "intermediate.dense output.dense",
        ),
    ),
    "wavlm": (  # the projection of relative positions comes behind the output
        wavlm,
        "encoder.layers.{}",
        (
            "attention: attention.k_proj attention.v_proj attention.q_proj attention.out_proj "
            "attention.gru_rel_pos_linear -> attention.out_proj",
            "feed_forward.intermediate_dense feed_forward.output_dense",
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_with_their_parts(name: str) -> None:
    build, path, expected = MODELS[name]
    found = blocks(build())
    assert [block.path for block in found] == [path.format(0), path.format(1)]
    for block in found:
        assert shown(block) == expected
        assert [a.cross for a in block.attentions] == [False, True][: len(block.attentions)]


class Gated(nn.Module):
    """An attention whose output is multiplied by a gate, defined behind everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in "qkv")
        self.o_proj, self.gate_proj = nn.Linear(8, 8), nn.Linear(8, 8)


class Unnamed(nn.Module):
    """An attention whose output has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in "qkv")
        self.mix = nn.Linear(8, 8)


@pytest.mark.parametrize(("attention", "output"), [(Gated, "attn.o_proj"), (Unnamed, "attn.mix")])
def test_a_gate_behind_the_output_is_not_the_output(attention: type[nn.Module], output: str) -> None:
    layer = nn.ModuleDict({"attn": attention(), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})
    [block] = blocks(layer)
    assert [a.output for a in block.attentions] == [output]
    assert block.ffn == ("up", "down")
    inject(layer, LoRA(r=2, target_modules=["attention-output"]))
    assert [path for path, m in layer.named_modules() if hasattr(m, "lora_A")] == [f"{output}.peft.default"]


def test_an_attention_alone_is_a_block_without_a_feedforward_part() -> None:
    for model, path in ((nn.MultiheadAttention(8, 2), ""), (nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), "a")):
        [block] = blocks(model)
        assert [a.path for a in block.attentions] == [path]
        assert block.ffn == ()


def test_what_lies_outside_of_the_stack_belongs_to_no_block() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12)
            self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
            self.stack = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    [block] = blocks(Network())
    assert block.path == "stack.layers.0"
    assert block.ffn == ("stack.layers.0.linear1", "stack.layers.0.linear2")


def test_without_three_projections_there_is_no_block() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    assert blocks(Pair()) == []
    assert blocks(nn.Sequential(nn.Linear(4, 4))) == []
    assert blocks(nn.LSTM(4, 4)) == []


def test_weights_are_not_read() -> None:
    with torch.device("meta"):
        model = tiny_models.llama()
    assert [block.path for block in blocks(model)] == ["model.layers.0", "model.layers.1"]
