"""Selective tuning: which parameters are chosen, and that they train as they would in plain torch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny_models
import torch
import transformers as hf
from plain_training import assert_trains_as_plain_torch, masked, randomise, trained
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
from lightning_peft.core.checkpoint import adapter_state
from lightning_peft.errors import ConfigError, NotApplicableError, NotMergeableError, TargetError

IDS = torch.tensor([[5, 9, 7, 3], [8, 4, 6, 1]])
BLOCK = 4 * (16 * 16 + 16) + 2 * 16 * 24 + 24 + 16 + 4 * 16
EMBEDDINGS = (40 + 20 + 2) * 16
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def _ids(model: nn.Module) -> Tensor:
    return model(IDS).logits


def _translated(model: nn.Module) -> Tensor:
    return model(IDS, decoder_input_ids=IDS[:, :3]).logits


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
    assert_trains_as_plain_torch(model, SelectiveTuning(modules_to_save=None, **fields), names, _ids)
    expected = _ids(model)
    merge(model)
    torch.testing.assert_close(_ids(model), expected, rtol=1e-5, atol=1e-5)


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
    assert kinds.pop("classifier") == "trained whole"
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
    run = _ids if build is tiny_models.llama else _translated
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


def test_without_a_choice_it_is_an_error_when_it_is_planned_not_when_it_is_made() -> None:
    method = SelectiveTuning()
    model = tiny_models.bert()
    before = Snapshot(model)
    with pytest.raises(
        TargetError, match=r"nothing to choose by: set target_modules, .* or token_ids\. .*Callback\(None"
    ):
        inject(model, method)
    before.assert_same(model)


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (tiny_models.bert, {"target_modules": ".*"}),
        (tiny_models.bert, {"target_modules": ["bert"]}),
        (tiny_models.bert, {"parameter_types": ["weight", "bias", "norm", "embedding"]}),
        (tiny_models.llama, {"parameters": [".*"]}),
        (lambda: nn.MultiheadAttention(8, 2, kdim=4), {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"layers": [0, 1]}),
    ],
)
def test_everything_is_no_selection(build: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(TargetError, match=r"would train every parameter of \w+: .* use PEFTCallback\(None\)"):
        inject(model, SelectiveTuning(**fields))
    before.assert_same(model)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["pooller"]}, TargetError, r"'pooller' matches no layer with parameters\. Did .* 'pooler'"),
        ({"target_modules": ["norms"]}, TargetError, r"Did you mean 'norm'"),
        (
            {"parameters": ["query.wieght"]},
            TargetError,
            r"no parameter is called 'query.wieght'\. Did you mean 'query\.weight'",
        ),
        ({"parameters": ["query.bias"], "parameter_types": ["weight"]}, TargetError, "nothing is left to train"),
        ({"exclude_modules": ["pooller"]}, TargetError, "exclude_modules: 'pooller' matches nothing"),
        ({"layers": [5]}, TargetError, "there is no layer 5"),
        ({"target_modules": ["query"], "parameter_types": ["norm"]}, NotApplicableError, "none has any norm"),
        ({"target_modules": ["classifier"]}, TargetError, "'classifier' is trained whole already"),
        ({"target_modules": ["norm"], "density": 0.5}, NotApplicableError, "none has any embedding or weight"),
        ({"token_ids": [40]}, ConfigError, r"no token 40 in 'bert.embeddings.word_embeddings', which has 40 rows"),
        ({"token_ids": [1], "exclude_modules": ["embedding"]}, TargetError, "is excluded, or trained whole"),
        ({"token_ids": [1], "modules_to_save": ["embeddings"]}, TargetError, "is excluded, or trained whole"),
        (
            {"token_ids": [1], "target_modules": r".*(position|type).*"},
            TargetError,
            "'bert.*': name one of them in tar",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_helps_and_changes_nothing(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny_models.bert()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, SelectiveTuning(**fields))
    before.assert_same(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": []}, "parameters must be a list of non-empty strings, or null"),
        ({"parameters": "query"}, "parameters must be a list"),
        ({"parameters": ["("]}, "parameters must be a list of suffixes or regular expressions"),
        (
            {"parameter_types": ["weights"]},
            "parameter_types: 'weights' is none of 'weight', 'bias', 'norm', 'embedding'",
        ),
        ({"parameter_types": "bias"}, "parameter_types must be a list"),
        ({"token_ids": []}, "token_ids must be a list of whole numbers from 0 on"),
        ({"token_ids": [-1]}, "token_ids must be"),
        ({"token_ids": [1.0]}, "token_ids must be"),
        ({"token_ids": [True]}, "token_ids must be"),
        ({"token_ids": 3}, "token_ids must be"),
        ({"token_ids": [4, 2, 4]}, "token_ids holds 4 more than once"),
        ({"density": 0}, "density must be a number greater than 0 and less than 1, or null, not 0"),
        ({"density": 1.0}, "density must be"),
        ({"density": float("nan")}, "density must be"),
        ({"density": "0.1"}, "density must be"),
        ({"density": True}, "density must be"),
        ({"density": 0.1, "score": "taylor"}, "score must be 'magnitude' or 'fisher', not 'taylor'"),
        ({"score": "fisher"}, "score='fisher' picks entries: say how many with density"),
        ({"density": 0.1, "score": "fisher", "score_batches": 0}, "score_batches must be at least 1 and whole"),
        ({"score_batches": 2.0}, "score_batches must be"),
        ({"layers": "1"}, "layers must be"),
    ],
)
def test_a_field_out_of_range_is_an_error_that_shows_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"SelectiveTuning\.{message}"):
        SelectiveTuning(**fields)


def test_it_survives_being_written_down() -> None:
    method = SelectiveTuning(layers=[-1], parameters=["x"], parameter_types=["bias"], token_ids=[2, 1], density=0.5)
    assert Method.from_config(method.to_config()) == method


# Single entries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.001, 0.1, 0.9])
def test_of_a_matrix_the_largest_entries_train(density: float) -> None:
    model = tiny_models.bert().eval()
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and ".layer." in n]
    count, masks = 0, {}
    for name in names:
        size = model.get_parameter(name).detach().abs()
        k = max(1, round(density * size.numel()))
        masks[name] = size >= size.flatten().sort(descending=True).values[k - 1]
        count += k
    expected = masked(model, masks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = SelectiveTuning(parameter_types=["weight"], layers=[0, 1], density=density, modules_to_save=None)
    report = inject(model, method)
    assert report.trainable == count
    assert sum(tensor.numel() for tensor in adapter_state(model).values()) == 2 * count  # each with its position
    torch.testing.assert_close(_ids(model), _ids(expected))
    losses = trained(expected, _ids, weight_decay=0)
    torch.testing.assert_close(torch.tensor(trained(model, _ids, weight_decay=0)), torch.tensor(losses))
    torch.testing.assert_close(_ids(model), _ids(expected), rtol=1e-3, atol=1e-5)
    merge(model)
    torch.testing.assert_close(_ids(model), _ids(expected), rtol=1e-3, atol=1e-5)
    for name, p in model.named_parameters():
        moved = p != before[name]
        assert torch.equal(moved, masks[name]) if name in masks else not moved.any(), name


def test_with_density_vectors_train_only_where_they_are_asked_for() -> None:
    for fields, vectors in [({}, 0), ({"parameter_types": ["weight", "bias"]}, 16), ({"parameters": [".*"]}, 16)]:
        report = inject(
            tiny_models.bert(),
            SelectiveTuning(target_modules=["pooler"], density=0.25, modules_to_save=None, **fields),
        )
        assert report.trainable == 16 * 16 // 4 + vectors


def test_kernels_tables_and_attention_can_be_sparse() -> None:
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(2, 4, 3, bias=False), "table": nn.Embedding(10, 4), "mha": nn.MultiheadAttention(4, 2)}
    )
    report = inject(model, SelectiveTuning(density=0.5))
    assert {(row.host, row.trainable) for row in report.hosts} == {("conv", 36), ("table", 20), ("mha", 24), ("mha", 8)}


def test_a_tied_table_can_be_sparse() -> None:
    model = tiny_models.llama().eval()
    table = model.lm_head.weight.detach().abs()
    mask = table >= table.flatten().sort(descending=True).values[63]
    expected = masked(model, {"model.embed_tokens.weight": mask})
    assert inject(model, SelectiveTuning(parameter_types=["embedding"], density=0.1)).trainable == 64
    trained(model, _ids, weight_decay=0)
    trained(expected, _ids, weight_decay=0)
    torch.testing.assert_close(_ids(model), _ids(expected), rtol=1e-3, atol=1e-5)
    merge(model)
    torch.testing.assert_close(_ids(model), _ids(expected), rtol=1e-3, atol=1e-5)


# Rows of tokens ------------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 6, **fields), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh().mean(1))


def _bag(model: nn.Module) -> Tensor:
    return model(IDS.int())


def _masked_lm() -> nn.Module:
    return tiny_models.bert(hf.BertForMaskedLM)


TABLES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], str]] = {
    # the network, how to run it, and the first name of its table
    "llama, tied": (tiny_models.llama, _ids, "model.embed_tokens.weight"),
    "llama": (lambda: tiny_models.llama(tie_word_embeddings=False), _ids, "model.embed_tokens.weight"),
    "gpt2, tied": (tiny_models.gpt2, _ids, "transformer.wte.weight"),
    "t5, tied": (tiny_models.t5, _translated, "shared.weight"),
    "bart, tied": (tiny_models.bart, _translated, "model.shared.weight"),
    "bart, scaled": (lambda: tiny_models.bart(scale_embedding=True), _translated, "model.shared.weight"),
    "gemma3, scaled": (tiny_models.gemma3, _ids, "model.embed_tokens.weight"),
    "bert": (tiny_models.bert, _ids, "bert.embeddings.word_embeddings.weight"),
    "masked language model": (_masked_lm, _ids, "bert.embeddings.word_embeddings.weight"),
    "plain": (Bag, _bag, "table.weight"),
    "padding": (lambda: Bag(padding_idx=5), _bag, "table.weight"),
    "by frequency": (lambda: Bag(scale_grad_by_freq=True), _bag, "table.weight"),
}


@pytest.mark.parametrize("case", TABLES)
def test_rows_train_as_those_of_the_table_itself(case: str) -> None:
    build, run, name = TABLES[case]
    model = build().eval()
    randomise(model)
    tokens = [9, 5, 11, 4]
    mask = torch.zeros(len(model.get_parameter(name)), 1).index_fill_(0, torch.tensor(tokens), 1)
    expected = masked(model, {name: mask})
    before = model.get_parameter(name).detach().clone()
    report = inject(model, SelectiveTuning(token_ids=tokens, modules_to_save=None))
    assert report.trainable == 4 * before.shape[1]
    torch.testing.assert_close(run(model), run(expected))
    losses = trained(expected, run, weight_decay=0)
    assert losses[2] != losses[0]
    torch.testing.assert_close(torch.tensor(trained(model, run, weight_decay=0)), torch.tensor(losses))
    after = run(model)
    torch.testing.assert_close(after, run(expected), rtol=1e-3, atol=1e-5)
    with disabled(model):
        assert (run(model) - after).abs().max() > 1e-3
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_parameter(name)]
    merge(model)
    torch.testing.assert_close(run(model), after, rtol=1e-5, atol=1e-5)
    moved = (model.get_parameter(name) != before).any(1).nonzero().flatten().tolist()
    assert set(moved) <= set(tokens)
    assert len(moved) == (4 if len(tied) > 1 else 3 - (case == "padding"))  # 11 is not in the input
    assert all(model.get_parameter(n) is model.get_parameter(name) for n in tied)


@pytest.mark.parametrize("fields", [{}, {"padding_idx": 4}, {"scale_grad_by_freq": True}, {"max_norm": 0.7}])
def test_the_gradient_of_a_row_is_that_of_the_table(fields: dict[str, Any]) -> None:
    ids = torch.tensor([[4, 4, 4, 9], [9, 1, 2, 4]])
    model = Bag(**fields)
    expected = copy.deepcopy(model)
    expected(ids).square().sum().backward()
    inject(model, SelectiveTuning(token_ids=[9, 4, 7]))
    model(ids).square().sum().backward()
    found = model.table.peft.get_submodule("default:weight").values.grad
    torch.testing.assert_close(found, expected.table.weight.grad[[4, 7, 9]])
    assert found.any(1).tolist() == ["padding_idx" not in fields, False, True]


def test_a_table_is_not_copied_in_the_forward_pass() -> None:
    """Only what is looked up, and what is scored, is made: tables of language models have gigabytes."""
    model = tiny_models.llama(vocab_size=5000).eval()
    inject(model, SelectiveTuning(token_ids=[3, 4]))
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        _ids(model)
    table = model.lm_head.weight
    assert max(n for n in sizes if n != table.numel()) < table.numel() / 2


def test_other_fields_choose_further_parameters() -> None:
    model = tiny_models.llama()
    report = inject(model, SelectiveTuning(token_ids=[3], target_modules=["q_proj", "embed_tokens"], layers=None))
    assert report.trainable == 16 + 2 * 16 * 16
    model = tiny_models.llama(tie_word_embeddings=False)
    assert inject(model, SelectiveTuning(token_ids=[3], parameter_types=["norm"])).trainable == 16 + 5 * 16


def test_rows_train_at_one_place_where_the_other_is_excluded() -> None:
    model = tiny_models.llama()
    report = inject(model, SelectiveTuning(token_ids=[3, 7], exclude_modules=["lm_head"]))
    assert [(row.host, row.trainable) for row in report.hosts] == [("model.embed_tokens", 32)]
    with pytest.raises(NotMergeableError, match=r"'model\.embed_tokens\.weight' is tied to 'lm_head\.weight'"):
        merge(model)


def test_the_table_of_a_plain_network_is_named_or_the_only_one() -> None:
    tables = nn.ModuleDict({"words": nn.Embedding(9, 4), "places": nn.Embedding(9, 3)})
    assert inject(tables, SelectiveTuning(token_ids=[0, 8], target_modules=["words"])).trainable == 8
    remove(tables)
    with pytest.raises(TargetError, match="tokens could be those of 'words', 'places': name one of them"):
        inject(tables, SelectiveTuning(token_ids=[0]))
    assert inject(nn.Embedding(9, 4), SelectiveTuning(token_ids=[0])).trainable == 4
    with pytest.raises(NotApplicableError, match="Linear has no embedding whose rows could train"):
        inject(nn.Linear(2, 2), SelectiveTuning(token_ids=[0]))


def test_the_order_in_which_tokens_are_named_does_not_matter() -> None:
    model = Bag()
    inject(model, SelectiveTuning(token_ids=[7, 2, 5]))
    adapter = model.table.peft.get_submodule("default:weight")
    assert adapter.index.tolist() == [2, 5, 7]
    assert_identical(adapter.values.detach(), model.table.weight.detach()[[2, 5, 7]])


# Both, and the whole of them -----------------------------------------------------------------------------------------

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
    before, base = Snapshot(model), _ids(model).detach()
    outputs = {}
    for name in "ab":
        inject(model, method, name)
        with active(model, name):
            trained(model, _ids, steps=2 if name == "a" else 4)
            outputs[name] = _ids(model).detach()
    assert (outputs["a"] - outputs["b"]).abs().max() > 1e-3
    for name in "ab":
        with active(model, name), torch.no_grad():
            assert_identical(_ids(model), outputs[name])
    with disabled(model):
        torch.testing.assert_close(_ids(model), base)
    remove(model, "a")
    torch.testing.assert_close(_ids(model), outputs["b"])
    remove(model, "b")
    before.assert_same(model)


@pytest.mark.parametrize("case", PARTIAL)
def test_beside_a_bf16_base_they_train_in_full_precision(case: str) -> None:
    model = tiny_models.llama().bfloat16().eval()
    expected = _ids(model)
    inject(model, SelectiveTuning(**PARTIAL[case]))
    torch.testing.assert_close(_ids(model), expected)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trained(model, _ids)
    assert _ids(model).dtype == torch.bfloat16
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
    found = _ids(task.net.eval())
    assert_identical(_ids(loaded.net.eval()), found)
    with disabled(task):
        assert (_ids(task.net) - found).abs().max() > 1e-3
    for name, tensor in before.state.items():
        assert_identical(task.state_dict()[name], tensor, name)
