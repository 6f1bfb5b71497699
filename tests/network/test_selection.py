"""Which parameters a base has, who reads them, and the copies of them that train."""

import pytest
import tiny_models
import torch
import transformers as hf
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import BitFit, LinearProbe, LoRA, SelectiveTuning, inject, merge, report
from lightning_peft.components.entries import tune
from lightning_peft.components.tuned import FullyTrainedParameters, TunedParameters
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.parameters import KINDS, BaseParameter, count, find_parameters

IDS = torch.tensor([[5, 9, 7, 3], [8, 4, 6, 1]])


class Parts(nn.Module):
    """Parameters of every kind, and of none."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(5, 4), nn.EmbeddingBag(5, 4)
        self.mha = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True)
        self.rnn, self.norm = nn.GRU(4, 3), nn.LayerNorm((2, 4))
        self.gate, self.token = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(1, 1, 4))
        self.shift_bias, self.bias_table = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 2))
        self.steps = nn.ParameterDict({"a": torch.ones(4), "b": torch.ones(4, 4)})
        self.register_buffer("mean", torch.zeros(4))


def _kinds(parameters: list[BaseParameter]) -> dict[str, set[str]]:
    return {p.full_name: set(p.kinds) for p in parameters}


def test_every_parameter_has_its_kinds() -> None:
    model = Parts()
    found = find_parameters(model)
    assert {p.full_name for p in found} == {name for name, _ in model.named_parameters()}
    assert _kinds(found) == {
        "gate": set(),
        "token": {"weight"},
        "shift_bias": {"bias"},
        "bias_table": {"weight"},
        "steps.a": set(),
        "steps.b": {"weight"},
        "table.weight": {"embedding"},
        "bag.weight": {"embedding"},
        **{f"mha.{name}_proj_weight": {"weight"} for name in "qkv"},
        "mha.in_proj_bias": {"bias"},
        "mha.bias_k": {"weight"},
        "mha.bias_v": {"weight"},
        "mha.out_proj.weight": {"weight"},
        "mha.out_proj.bias": {"bias"},
        **{f"rnn.weight_{part}_l0": {"weight"} for part in ("ih", "hh")},
        **{f"rnn.bias_{part}_l0": {"bias"} for part in ("ih", "hh")},
        "norm.weight": {"norm"},
        "norm.bias": {"norm", "bias"},
    }
    assert set().union(*(p.kinds for p in found)) == set(KINDS)


def test_the_modules_that_read_a_parameter_are_known() -> None:
    places = {(p.layer, p.path, p.name, p.part) for p in find_parameters(Parts())}
    assert {
        ("mha.q_proj", "mha", "q_proj_weight", None),
        ("mha.q_proj", "mha", "in_proj_bias", (0, 4)),
        ("mha.k_proj", "mha", "in_proj_bias", (4, 8)),
        ("mha.v_proj", "mha", "in_proj_bias", (8, 12)),
        ("mha.out_proj", "mha", "out_proj.bias", None),
        ("mha", "mha", "bias_k", None),
        ("steps", "", "steps.a", None),
        ("", "", "gate", None),
        ("rnn", "rnn", "bias_ih_l0", None),
    } <= places


@pytest.mark.parametrize(
    "build",
    [tiny_models.bert, tiny_models.gpt2, tiny_models.llama, tiny_models.t5, tiny_models.bart, tiny_models.vit, Parts],
)
def test_together_they_are_the_whole_base(build: type[nn.Module]) -> None:
    model = build()
    size = sum(p.numel() for p in model.parameters())
    assert count(find_parameters(model)) == size
    inject(model, LoRA(r=1, modules_to_save=None))
    assert count(find_parameters(model)) == size, "adapters are no part of the base"


def test_a_tied_matrix_is_a_table_at_every_place() -> None:
    found = [p for p in find_parameters(tiny_models.llama()) if "embedding" in p.kinds]
    assert [p.full_name for p in found] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert count(found) == 40 * 16


def test_what_is_chosen_at_one_place_is_chosen_at_all() -> None:
    model = tiny_models.llama()
    chosen = SelectiveTuning(target_modules=["lm_head"]).select_parameters(model, [])
    assert [p.full_name for p in chosen] == ["model.embed_tokens.weight", "lm_head.weight"]
    first, second = (placement.adapter for placement in tune(chosen))
    assert first.get_parameter("weight") is second.get_parameter("weight")


def test_nothing_below_a_saved_module_is_chosen() -> None:
    model = tiny_models.llama()
    chosen = SelectiveTuning(parameter_types=["embedding"]).select_parameters(model, ["lm_head"], ["embedding"])
    assert [p.full_name for p in chosen] == ["model.embed_tokens.weight"]


def test_a_copy_of_some_parameters_leaves_the_others_to_the_base() -> None:
    host = nn.BatchNorm1d(3)
    assert TunedParameters(host).names == ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    part = TunedParameters(host, ["bias"])
    assert part.names == ("bias",)
    assert list(part.state_dict()) == ["bias"]


def test_the_report_tells_what_is_tuned_from_what_is_trained_whole() -> None:
    model = tiny_models.bert()
    inject(model, BitFit())
    kinds = {row.adapter_type for row in report(model).hosts}
    assert kinds == {"BitFit", "fully trained"}
    assert isinstance(model.classifier.peft.default, FullyTrainedParameters)
    assert not isinstance(model.bert.pooler.dense.peft.default, FullyTrainedParameters)


def test_modules_that_are_trained_whole_and_tied_stay_tied() -> None:
    model = tiny_models.llama().eval()
    inject(model, LinearProbe(modules_to_save=["embed_tokens", "lm_head"]))
    weight = model.lm_head.peft.default.weight
    assert weight is model.model.embed_tokens.peft.default.weight
    with torch.no_grad():
        weight.normal_()
    expected = model(IDS).logits
    merge(model)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_head_of_a_masked_language_model_can_be_trained_whole() -> None:
    """It holds its bias under two names, and reads it under one."""
    model = tiny_models.bert(hf.BertForMaskedLM)
    size = sum(p.numel() for p in model.cls.parameters())
    inject(model, LinearProbe(modules_to_save=["cls"]))
    model(IDS).logits.square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert report(model).trainable == size


class Named(nn.Module):
    """Parameters called as an adapter's own attributes are."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.trains, self.merge = (nn.Parameter(torch.randn(3)) for _ in range(3))
        self.body = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.names + self.trains) * self.merge


def test_names_that_an_adapter_has_itself_are_no_trouble() -> None:
    model, x = Named(), torch.randn(2, 3)
    inject(model, SelectiveTuning(parameters=["names", "trains", "merge"]))
    model(x).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                assert p.grad.any()
                p.add_(1.0)
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_what_cannot_be_trained_is_refused_and_the_model_is_as_it_was(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    model.body.weight = nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
    before = Snapshot(model)
    for method in (SelectiveTuning(target_modules=["body"]), LinearProbe(modules_to_save=["body"])):
        with pytest.raises(NotApplicableError, match=rf"weight' cannot be trained: it is {dtype}"):
            inject(model, method)
        before.assert_same(model)
    assert inject(model, BitFit()).trainable == 6


def test_a_lazy_layer_is_refused() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.LazyLinear(2)})
    with pytest.raises(NotApplicableError, match="lazy layer"):
        inject(model, BitFit())
    with pytest.raises(NotApplicableError, match=r"'weight' has no values yet \(a lazy layer\)"):
        inject(model, LinearProbe(modules_to_save=["head"]))
    assert all(p.requires_grad for p in model.parameters())


def test_what_a_weight_is_computed_from_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=r"'0\.parametrizations\.weight\.original0' only goes into a weight"):
        inject(model, SelectiveTuning(target_modules=["0"]))
    before.assert_same(model)
    assert inject(model, SelectiveTuning(target_modules=["0"], exclude_modules=["parametrizations"])).trainable == 3
