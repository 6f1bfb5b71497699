"""What each layer of a transformer does, told from where it sits."""

from collections.abc import Callable

import pytest
import tiny_models
from torch import nn

from lightning_peft.network.blocks import find_roles
from lightning_peft.network.hosts import find_hosts


def _layers(prefix: str, **roles: str) -> dict[str, set[str]]:
    """Names in the two layers at ``prefix`` (with {} for the index) for each role; several are separated by spaces."""
    return {
        role.replace("_", "-"): {f"{prefix.format(i)}.{name}" for i in (0, 1) for name in names.split()}
        for role, names in roles.items()
    }


def _union(*parts: dict[str, set[str]]) -> dict[str, set[str]]:
    return {role: set().union(*(part.get(role, set()) for part in parts)) for part in parts for role in part}


def _bert(prefix: str, relative: bool = False) -> dict[str, set[str]]:
    """Layers named as BERT names them; with ``relative``, as DeBERTa."""
    suffix = "_proj" if relative else ""
    return _layers(
        prefix,
        query=f"attention.self.query{suffix}",
        key=f"attention.self.key{suffix}",
        value=f"attention.self.value{suffix}",
        attention_output="attention.output.dense",
        ffn="intermediate.dense output.dense",
        ffn_output="output.dense",
    )


def _projections(prefix: str, *attentions: str, out: str, ffn: str) -> dict[str, set[str]]:
    """Layers whose attentions have q_proj, k_proj, v_proj and an output called ``out``."""
    own = [
        _layers(
            prefix,
            query=f"{name}.q_proj",
            key=f"{name}.k_proj",
            value=f"{name}.v_proj",
            attention_output=f"{name}.{out}",
        )
        for name in attentions
    ]
    return _union(*own, _layers(prefix, ffn=ffn, ffn_output=ffn.split()[-1]))


def _t5(stack: str, *attentions: str, ffn: str) -> dict[str, set[str]]:
    prefix = stack + ".block.{}.layer"
    own = [
        _layers(prefix, query=f"{name}.q", key=f"{name}.k", value=f"{name}.v", attention_output=f"{name}.o")
        for name in attentions
    ]
    return _union(*own, _layers(prefix, ffn=f"{ffn}.wi_0 {ffn}.wi_1 {ffn}.wo", ffn_output=f"{ffn}.wo"))


_SEQ2SEQ = _union(
    _projections("model.encoder.layers.{}", "self_attn", out="out_proj", ffn="fc1 fc2"),
    _projections("model.decoder.layers.{}", "self_attn", "encoder_attn", out="out_proj", ffn="fc1 fc2"),
)

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, set[str]]]] = {
    "bert": (tiny_models.bert, _bert("bert.encoder.layer.{}")),
    "roberta": (tiny_models.roberta, _bert("roberta.encoder.layer.{}")),
    "distilbert": (
        tiny_models.distilbert,
        _layers(
            "distilbert.transformer.layer.{}",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            attention_output="attention.out_lin",
            ffn="ffn.lin1 ffn.lin2",
            ffn_output="ffn.lin2",
        ),
    ),
    "deberta": (tiny_models.deberta, _bert("deberta.encoder.layer.{}", relative=True)),
    "gpt2": (
        tiny_models.gpt2,
        _layers(
            "transformer.h.{}",
            fused="attn.c_attn",
            attention_output="attn.c_proj",
            ffn="mlp.c_fc mlp.c_proj",
            ffn_output="mlp.c_proj",
        ),
    ),
    "llama": (
        tiny_models.llama,
        _projections("model.layers.{}", "self_attn", out="o_proj", ffn="mlp.gate_proj mlp.up_proj mlp.down_proj"),
    ),
    "t5": (
        tiny_models.t5,
        _union(
            _t5("encoder", "0.SelfAttention", ffn="1.DenseReluDense"),
            _t5("decoder", "0.SelfAttention", "1.EncDecAttention", ffn="2.DenseReluDense"),
        ),
    ),
    "bart": (tiny_models.bart, _SEQ2SEQ),
    "whisper": (tiny_models.whisper, _SEQ2SEQ),
    "vit": (tiny_models.vit, _projections("vit.layers.{}", "attention", out="o_proj", ffn="mlp.fc1 mlp.fc2")),
    "clip_text": (
        tiny_models.clip_text,
        _projections("encoder.layers.{}", "self_attn", out="out_proj", ffn="mlp.fc1 mlp.fc2"),
    ),
    "torch_decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 2),
        _layers(
            "layers.{}",
            fused="self_attn.in_proj multihead_attn.in_proj",
            attention_output="self_attn.out_proj multihead_attn.out_proj",
            ffn="linear1 linear2",
            ffn_output="linear2",
        ),
    ),
}


def _found(model: nn.Module) -> dict[str, set[str]]:
    return find_roles(list(find_hosts(model)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("role", ["query", "key", "value", "fused", "attention-output", "ffn", "ffn-output"])
def test_the_layers_of_each_role_are_found(name: str, role: str) -> None:
    build, expected = MODELS[name]
    assert _found(build())[role] == expected.get(role, set())


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_its_projections_and_its_output(name: str) -> None:
    build, expected = MODELS[name]
    parts = ("query", "key", "value", "fused", "attention-output")
    assert _found(build())["attention"] == set().union(*(expected.get(part, set()) for part in parts))


def test_positional_projections_of_deberta_are_neither_output_nor_feedforward() -> None:
    """With share_att_key=False each attention has two more projections, after the value's."""
    found = _found(tiny_models.deberta(share_att_key=False))
    expected = _bert("deberta.encoder.layer.{}", relative=True)
    for role in ("query", "key", "value", "attention-output", "ffn", "ffn-output"):
        assert found[role] == expected[role], role


def test_a_model_of_one_layer_has_the_same_roles() -> None:
    found = _found(tiny_models.bert(num_hidden_layers=1))
    expected = _bert("bert.encoder.layer.{}")
    for role, names in expected.items():
        assert found[role] == {name for name in names if ".0." in name}, role


def test_a_network_without_attention_has_no_roles() -> None:
    assert not any(_found(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))).values())


def test_a_feature_that_is_called_value_makes_no_attention() -> None:
    """An actor and a critic: neither a query nor a key beside the value."""
    assert not any(_found(nn.ModuleDict({"policy": nn.Linear(4, 2), "value": nn.Linear(4, 1)})).values())


def test_the_pooler_and_the_head_belong_to_no_block() -> None:
    roles = _found(tiny_models.bert())
    assert not any(name.startswith(("bert.pooler", "classifier")) for names in roles.values() for name in names)
