"""Selection by name, expression, role and layer; what matches nothing is an error that helps."""

import itertools
import re

import pytest
import tiny_models
from snapshot import Snapshot
from torch import nn

from lightning_peft import (
    IA3,
    BitFit,
    BottleneckAdapter,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    SelectiveTuning,
    inject,
)
from lightning_peft.core.method import Method
from lightning_peft.errors import TargetError
from lightning_peft.network.patterns import layer_index, matches_end, pattern_value
from lightning_peft.network.targets import match_modules, select_hosts


def _names(model: nn.Module, *args: object, **kwargs: object) -> list[str]:
    return [host.name for host in select_hosts(model, *args, **kwargs)]


@pytest.fixture
def bert() -> nn.Module:
    return tiny_models.bert()


BLOCK = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def _bert(*names: str, layers: tuple[int, ...] = (0, 1)) -> list[str]:
    return [f"bert.encoder.layer.{i}.{name}" for i in layers for name in names]


def test_all_linear_takes_every_linear_layer_but_the_task_head(bert: nn.Module) -> None:
    assert _names(bert, "all-linear") == [*_bert(*BLOCK), "bert.pooler.dense"]


def test_all_linear_leaves_the_output_embedding_of_a_language_model_alone() -> None:
    model = tiny_models.llama()
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert _names(model, "all-linear") == [f"model.layers.{i}.{name}" for i in (0, 1) for name in projections]


def test_all_linear_takes_transposed_layers_and_attention_but_no_kernels_and_tables() -> None:
    assert _names(tiny_models.gpt2(), "all-linear") == [
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    net = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1), "table": nn.Embedding(2, 2), "mha": nn.MultiheadAttention(4, 2)})
    assert _names(net, "all-linear") == ["mha.in_proj", "mha.out_proj"]


def test_a_suffix_matches_whole_parts_of_a_name(bert: nn.Module) -> None:
    assert _names(bert, ["query"]) == _bert("attention.self.query")
    assert _names(bert, ["self.query", "self.value"]) == _bert("attention.self.query", "attention.self.value")
    assert _names(bert, "attention.output.dense") == _bert("attention.output.dense")
    with pytest.raises(TargetError):
        _names(bert, ["uery"])


def test_a_whole_name_matches_itself_alone(bert: nn.Module) -> None:
    assert _names(bert, ["bert.pooler.dense"]) == ["bert.pooler.dense"]


def test_the_name_of_an_attention_matches_all_its_weights() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 12)
    assert _names(layer, ["self_attn"]) == ["self_attn.in_proj", "self_attn.out_proj"]
    assert _names(layer, ["out_proj"]) == ["self_attn.out_proj", "multihead_attn.out_proj"]


def test_an_expression_must_match_the_whole_name(bert: nn.Module) -> None:
    assert _names(bert, r".*\.1\..*(query|value)") == _bert("attention.self.query", "attention.self.value", layers=(1,))
    with pytest.raises(TargetError, match="matches no layer"):
        _names(bert, r"layer\.1")


def test_expressions_and_roles_may_stand_in_a_list(bert: nn.Module) -> None:
    assert _names(bert, [r".*\.0\..*key", "ffn-output"]) == [
        *_bert("attention.self.key", "output.dense", layers=(0,)),
        *_bert("output.dense", layers=(1,)),
    ]


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("attention", BLOCK[:4]),
        ("ffn", BLOCK[4:]),
        ("query", BLOCK[:1]),
        ("attention-output", BLOCK[3:4]),
        ("ffn-output", BLOCK[5:]),
    ],
)
def test_a_role_stands_for_its_layers(bert: nn.Module, role: str, expected: tuple[str, ...]) -> None:
    assert _names(bert, role) == _names(bert, [role]) == _bert(*expected)


def test_hosts_come_in_the_order_of_the_model_and_once(bert: nn.Module) -> None:
    assert _names(bert, ["value", "query", "attention", "self.query"]) == _bert(*BLOCK[:4])


def test_exclusion_drops_a_name_and_all_below_it(bert: nn.Module) -> None:
    assert _names(bert, "all-linear", "pooler") == _bert(*BLOCK)
    assert _names(bert, "all-linear", ["pooler", "output"]) == _bert(*BLOCK[:3], "intermediate.dense")
    assert _names(bert, "all-linear", ["attention", "pooler"]) == _bert(*BLOCK[4:])


def test_exclusion_takes_roles_and_expressions(bert: nn.Module) -> None:
    assert _names(bert, "all-linear", ["ffn", "bert.pooler.dense"]) == _bert(*BLOCK[:4])
    assert _names(bert, "all-linear", r".*\.dense") == _bert(*BLOCK[:3])


def test_layers_are_counted_from_either_end(bert: nn.Module) -> None:
    assert _names(bert, ["query"], layers=[0]) == _bert("attention.self.query", layers=(0,))
    assert _names(bert, ["query"], layers=[-1]) == _bert("attention.self.query", layers=(1,))
    assert _names(bert, ["query"], layers=[-2, 1]) == _bert("attention.self.query")


def test_layers_of_two_stacks_are_counted_each_for_itself() -> None:
    model = tiny_models.t5(num_layers=3, num_decoder_layers=2)
    last = [name for name in _names(model, ["wo"], layers=[-1])]
    assert last == ["encoder.block.2.layer.1.DenseReluDense.wo", "decoder.block.1.layer.2.DenseReluDense.wo"]
    assert _names(model, ["wo"], layers=[2]) == ["encoder.block.2.layer.1.DenseReluDense.wo"]


@pytest.mark.parametrize("index", [2, 5, -3])
def test_a_layer_out_of_range_is_an_error_that_says_what_there_is(bert: nn.Module, index: int) -> None:
    with pytest.raises(TargetError, match=rf"no layer {index}.*'bert.encoder.layer' \(0 to 1\)"):
        _names(bert, "all-linear", layers=[0, index])


def test_layers_of_a_network_without_numbers_are_an_error() -> None:
    with pytest.raises(TargetError, match="Numbered layers here: none"):
        _names(nn.ModuleDict({"fc": nn.Linear(2, 2)}), ["fc"], layers=[0])


def test_nothing_below_a_module_that_is_trained_whole_is_chosen(bert: nn.Module) -> None:
    assert _names(bert, ["dense"], fully_trained=["bert.pooler"]) == _bert(*BLOCK[3:])
    with pytest.raises(TargetError, match=r"'classifier' is fully trained already \(modules_to_save\)"):
        _names(bert, ["classifier"], fully_trained=["classifier"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("querry", "'querry' matches no layer. Did you mean 'query'"),
        (["query", "qvalue"], "'qvalue' matches no layer. Did you mean 'value'"),
        (["zzz"], r"'zzz' matches no layer. Layers here: .*word_embeddings \(Embedding\).*query \(Linear\)"),
        (["query", ".*missing"], "'.*missing' matches no layer"),
        ("(", r"^target_modules: '\(' is neither the name of a layer nor a regular expression: missing \)"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(bert: nn.Module, targets: list[str] | str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        _names(bert, targets)


@pytest.mark.parametrize(
    ("method", "field"),
    [
        *itertools.product(
            [LoRA, IA3, BottleneckAdapter, BitFit, LayerNormTuning, SelectiveTuning],
            ["target_modules", "exclude_modules", "modules_to_save"],
        ),
        (PrefixTuning, "exclude_modules"),
        (PrefixTuning, "modules_to_save"),
        (IA3, "feedforward_modules"),
    ],
)
@pytest.mark.parametrize("pattern", ["conv(", "*.dense"])
def test_of_a_malformed_expression_the_field_and_the_value_are_named(
    bert: nn.Module, method: type[Method], field: str, pattern: str
) -> None:
    before = Snapshot(bert)
    chosen = {"target_modules": ["query"]} if field == "feedforward_modules" else {}
    with pytest.raises(TargetError, match=rf"^{field}: .*{re.escape(repr(pattern))}"):
        inject(bert, method(**{**chosen, field: [pattern]}))
    before.assert_same(bert)


def test_an_exclusion_that_matches_nothing_is_an_error(bert: nn.Module) -> None:
    with pytest.raises(TargetError, match=r"exclude_modules: 'poler' matches nothing\."):
        _names(bert, "all-linear", ["pooler", "poler"])


@pytest.mark.parametrize("pattern", ["experts", "mlp", "layers.1.mlp.experts", r".*\.mlp", "input_layernorm"])
@pytest.mark.parametrize("method", [LoRA, IA3, SelectiveTuning])
def test_what_is_in_the_model_and_is_not_adapted_anyway_may_be_excluded(method, pattern: str) -> None:
    chosen = {"target_modules": ["q_proj", "v_proj"]} if method is not IA3 else {}
    found = inject(tiny_models.mixtral(), method(**chosen, exclude_modules=[pattern]))
    plain = inject(tiny_models.mixtral(), method(**chosen))
    assert {row.host for row in found.hosts} == {row.host for row in plain.hosts}


@pytest.mark.parametrize("method", [LoRA, IA3, SelectiveTuning])
def test_a_misspelt_exclusion_is_told_of_modules_that_are_not_adapted(method) -> None:
    chosen = {"target_modules": ["q_proj"]} if method is not IA3 else {}
    for pattern, meant in (("expert", "experts"), ("q_prj", "q_proj")):
        message = rf"exclude_modules: '{pattern}' matches nothing\. Did you mean '{meant}'"
        with pytest.raises(TargetError, match=message):
            inject(tiny_models.mixtral(), method(**chosen, exclude_modules=[pattern]))


@pytest.mark.parametrize("method", [LoRA, SelectiveTuning])
@pytest.mark.parametrize("role", ["ffn", "ffn-output"])
def test_a_feedforward_part_of_experts_is_said_to_be_one(method, role: str) -> None:
    message = rf"'{role}' is made of experts here.*mlp\.experts\.\w+'.*target_modules=\['experts'\]"
    with pytest.raises(TargetError, match=message):
        inject(tiny_models.mixtral(), method(target_modules=[role]))


def test_excluding_all_that_was_chosen_is_an_error(bert: nn.Module) -> None:
    with pytest.raises(TargetError, match=r"target_modules=\['query'\], exclude_modules='attention'"):
        _names(bert, ["query"], "attention")


def test_a_network_without_layers_to_adapt_is_an_error() -> None:
    with pytest.raises(TargetError, match="no linear, convolution, embedding or attention layer"):
        _names(nn.ModuleDict({"norm": nn.LayerNorm(2)}), "all-linear")


@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_a_projection_inside_a_fused_weight_is_an_error_that_names_it(role: str) -> None:
    with pytest.raises(TargetError, match=f"'{role}' is not a layer of its own.*transformer.h.0.attn.c_attn"):
        _names(tiny_models.gpt2(), role)


def test_a_role_of_a_network_without_attention_says_so() -> None:
    with pytest.raises(TargetError, match=r"'attention' matches no layer\. The roles attention, .* need a transformer"):
        _names(nn.Sequential(nn.Linear(2, 2)), "attention")


def test_modules_are_matched_by_suffix_and_never_one_inside_another(bert: nn.Module) -> None:
    assert match_modules(bert, ["pooler", "bert.pooler.dense"], "modules_to_save") == ["bert.pooler"]
    assert match_modules(bert, ["LayerNorm", "classifier"], "f")[-1] == "classifier"


@pytest.mark.parametrize(
    ("pattern", "message"), [("clasifier", "Did you mean 'classifier'"), ("dropout", "no module with parameters")]
)
def test_a_module_that_is_not_there_or_has_no_parameters_is_an_error(
    bert: nn.Module, pattern: str, message: str
) -> None:
    with pytest.raises(TargetError, match=f"modules_to_save: .*'{pattern}'.*BertForSequenceClassification") as error:
        match_modules(bert, ["pooler", pattern], "modules_to_save")
    assert message in str(error.value)


def test_the_layer_index_is_that_of_the_outermost_numbered_container() -> None:
    assert layer_index("encoder.block.3.layer.1.wo") == ("encoder.block", 3)
    assert layer_index("0") == ("", 0)
    assert layer_index("fc1") is None


def test_pattern_values_match_the_end_of_a_name_at_a_dot() -> None:
    assert matches_end("q_proj", "layers.0.q_proj")
    assert matches_end(r"layers\.[01]\..*", "model.layers.1.q_proj")
    assert not matches_end("proj", "layers.0.q_proj")
    assert not matches_end("layers", "layers.0.q_proj")
    assert pattern_value({"k_proj": 1, ".*_proj": 2}, "a.q_proj", 3) == 2
    assert pattern_value({"k_proj": 1}, "a.q_proj", 3) == 3
