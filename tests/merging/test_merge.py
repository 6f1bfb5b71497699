"""Folding an adapter into the base, for good or for a while."""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from perturbation import perturb
from placing import Place, Scale, ScaleWeight, ShiftWeight
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    OFT,
    BitFit,
    DoRA,
    LoHa,
    LoRA,
    Method,
    SelectiveTuning,
    active,
    active_adapters,
    disabled,
    inject,
    merge,
    merged,
)
from lightning_peft.errors import AdapterNameError, NotMergeableError


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4)


def _lora(model: nn.Module, *targets: str, name: str = "default") -> nn.Module:
    inject(model, LoRA(r=2, target_modules=list(targets), modules_to_save=None), name)
    return perturb(model).eval()


@pytest.mark.parametrize(
    ("build", "targets"),
    [(tiny_models.gpt2, ["wte"]), (tiny_models.llama, ["embed_tokens"]), (tiny_models.llama, ["q_proj", "lm_head"])],
    ids=["gpt2", "llama", "llama_head"],
)
def test_a_weight_that_is_tied_to_another_layers_is_refused(build: object, targets: list[str]) -> None:
    model = _lora(build(), *targets)
    before = Snapshot(model)
    with pytest.raises(NotMergeableError, match=r"is tied to '(lm_head|.*embed_tokens)\.?.*would change both.*exclude"):
        merge(model)
    before.assert_same(model)
    with pytest.raises(NotMergeableError), merged(model):
        pytest.fail("merged in spite of the tie")
    before.assert_same(model)


def test_layers_that_are_not_tied_merge_in_a_model_that_ties_others() -> None:
    model, ids = _lora(tiny_models.llama(), "q_proj", "down_proj"), torch.arange(5)[None]
    expected = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tie_that_reaches_out_of_the_injected_part_is_refused_when_the_whole_is_merged() -> None:
    model = tiny_models.llama()
    _lora(model.model, "embed_tokens")
    head = model.lm_head.weight.detach().clone()
    with pytest.raises(NotMergeableError, match="tied"):
        merge(model)
    assert_identical(model.lm_head.weight.detach(), head)


def test_a_module_that_is_used_twice_merges_once(x: Tensor) -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.Tanh(), shared)
    _lora(net, "0")
    expected = net(x)
    merge(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)
    assert net[0] is net[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    net = _lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "0", "1")
    with torch.no_grad():
        net[1].peft.default.lora_B[0, 0] = value
    before = Snapshot(net)
    with pytest.raises(NotMergeableError, match=r"'1\.weight' gives values that are not finite in torch.float32"):
        merge(net)
    assert list(before.state) == list(net.state_dict())
    assert_identical(net[0].weight.detach(), before.state["0.weight"])


def test_a_value_too_large_for_the_bases_dtype_is_refused() -> None:
    net = _lora(nn.Sequential(nn.Linear(4, 4).half()), "0")
    with torch.no_grad():
        net[0].peft.default.lora_A.fill_(1e3)
        net[0].peft.default.lora_B.fill_(1e3)
    with pytest.raises(NotMergeableError, match=r"not finite in torch\.float16"):
        merge(net)


def test_a_16_bit_base_is_merged_in_fp32_and_rounded_once() -> None:
    net = _lora(nn.Sequential(nn.Linear(64, 64).bfloat16()), "0")
    adapter = net[0].peft.default
    expected = (net[0].weight.float() + 8.0 * adapter.lora_B @ adapter.lora_A).bfloat16()
    merge(net)
    assert_identical(net[0].weight.detach(), expected.detach())


def test_an_fp64_base_is_merged_in_fp64(x: Tensor) -> None:
    net = _lora(nn.Sequential(nn.Linear(4, 4)).double(), "0")
    expected = net(x.double())
    merge(net)
    torch.testing.assert_close(net(x.double()), expected, rtol=1e-13, atol=1e-14)


def test_a_quantized_weight_is_refused() -> None:
    net = _lora(nn.Sequential(nn.Linear(4, 4)), "0")
    net[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    before = Snapshot(net)
    with pytest.raises(NotMergeableError, match=r"quantized \(torch.int8\)"):
        merge(net)
    before.assert_same(net)


def test_one_adapter_that_cannot_be_merged_keeps_all_from_being_written() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(net, Place(adapters={"0": partial(ScaleWeight, "weight"), "1": Scale}))
    before = Snapshot(net)
    with pytest.raises(NotMergeableError, match="cannot be merged: what it computes is no change"):
        merge(net)
    before.assert_same(net)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(AdapterNameError, match="no adapter 'other'"):
        merge(_lora(nn.Sequential(nn.Linear(4, 4)), "0"), "other")
    with pytest.raises(AdapterNameError), merged(nn.Linear(2, 2)):
        pytest.fail("there is no adapter")


def test_merging_one_of_two_leaves_the_other_acting_on_the_merged_base(x: Tensor) -> None:
    net = _lora(_lora(nn.Sequential(nn.Linear(4, 4)), "0", name="a"), "0", name="b")
    both = net(x)
    with active(net, "a"):
        first = net(x)
    merge(net, "a")
    assert active_adapters(net) == ("b",)
    torch.testing.assert_close(net(x), both, rtol=1e-5, atol=1e-6)
    with disabled(net):
        torch.testing.assert_close(net(x), first, rtol=1e-5, atol=1e-6)


def test_an_adapter_that_does_not_act_can_be_merged_all_the_same(x: Tensor) -> None:
    net = _lora(nn.Sequential(nn.Linear(4, 4)), "0")
    expected = net(x)
    with disabled(net):
        merge(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)


def test_several_weights_of_one_host_merge_together() -> None:
    net, x = nn.MultiheadAttention(8, 2, kdim=5, vdim=6), torch.randn(3, 2, 8)
    key, value = torch.randn(4, 2, 5), torch.randn(4, 2, 6)
    _lora(net, "q_proj", "k_proj", "v_proj", "out_proj")
    expected = net(x, key, value)[0]
    merge(net)
    torch.testing.assert_close(net(x, key, value)[0], expected, rtol=1e-5, atol=1e-6)


def test_adapters_of_one_host_fold_one_into_the_other(x: Tensor) -> None:
    """Two parts of one adapter on one weight: the second acts on what the first made."""

    class Both(ScaleWeight):
        def __init__(self) -> None:
            super().__init__("weight", "bias")

    net = nn.Sequential(nn.Linear(4, 4))
    inject(net, Place(adapters={"0": Both}), "scale")
    inject(net, Place(adapters={"0": partial(ShiftWeight, "weight")}), "shift")
    expected = net(x)
    merge(net, "scale")
    merge(net, "shift")
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_within_merged_the_others_act_and_afterwards_every_bit_is_back(x: Tensor) -> None:
    net = _lora(_lora(nn.Sequential(nn.Linear(4, 4).bfloat16()), "0", name="a"), "0", name="b")
    before, output = Snapshot(net), net(x.bfloat16())
    with merged(net, "a"):
        assert active_adapters(net) == ("b",)
        assert not torch.equal(net[0].weight, before.state["0.weight"])
    assert active_adapters(net) == ("a", "b")
    before.assert_same(net)
    assert_identical(net(x.bfloat16()), output)


def test_an_exception_within_merged_restores_the_base(x: Tensor) -> None:
    net = _lora(nn.Sequential(nn.Linear(4, 4)), "0")
    before = Snapshot(net)
    with pytest.raises(RuntimeError, match="inside"), merged(net):
        raise RuntimeError("inside")
    before.assert_same(net)
    assert active_adapters(net) == ("default",)


def test_merged_twice_over_folds_two_adapters(x: Tensor) -> None:
    net = _lora(_lora(nn.Sequential(nn.Linear(4, 4)), "0", name="a"), "0", name="b")
    expected = net(x)
    before = Snapshot(net)
    with merged(net, "a"), merged(net, "b"):
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)
    before.assert_same(net)


def test_merging_a_copy_leaves_the_original_alone(x: Tensor) -> None:
    net = _lora(nn.Sequential(nn.Linear(4, 4)), "0")
    before, expected = Snapshot(net), net(x)
    duplicate = copy.deepcopy(net)
    merge(duplicate)
    before.assert_same(net)
    torch.testing.assert_close(duplicate(x), expected, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_renormalises_its_rows_merges_to_the_same_or_is_refused() -> None:
    """``max_norm`` rescales the rows that are looked up, in place: merged rows as well."""
    table, ids = nn.Sequential(nn.Embedding(6, 4, max_norm=1.0)), torch.tensor([0, 2, 5])
    table(torch.arange(6))  # every row has its norm now
    _lora(table, "0")
    expected = table(ids)
    with suppress(NotMergeableError):
        merge(table)
    torch.testing.assert_close(table(ids), expected, rtol=1e-5, atol=1e-6)


def test_what_acts_on_the_output_of_another_adapter_is_not_merged_before_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRA(r=2, target_modules=["0"]), "first")
    inject(model, IA3(target_modules=["0"]), "second")
    perturb(model)
    x = torch.randn(3, 4)
    expected = model(x)
    with pytest.raises(NotMergeableError, match="IA3 on '0' cannot be merged: the adapter 'first' acts there too"):
        merge(model, "second")
    assert torch.equal(model(x), expected)
    merge(model, "first")
    merge(model, "second")
    torch.testing.assert_close(model(x), expected)


TIED = [
    (tiny_models.gpt2, ["wte"], "transformer.wte"),
    (tiny_models.llama, ["embed_tokens", "q_proj"], "model.embed_tokens"),
    (tiny_models.llama, ["q_proj", "lm_head"], "lm_head"),
]


@pytest.mark.parametrize(("build", "targets", "path"), TIED, ids=["gpt2", "llama", "llama_head"])
def test_untied_a_tied_layer_merges_and_loads_as_it_was_saved(
    build: Callable[[], nn.Module], targets: list[str], path: str, tmp_path: Path
) -> None:
    model, ids = _lora(build(), *targets), torch.arange(5)[None]
    other = model.get_output_embeddings() if path != "lm_head" else model.get_input_embeddings()
    kept, expected = other.weight, model(ids).logits
    merge(model, untie=True)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert other.weight is kept
    assert model.get_submodule(path).weight is not kept
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("build", "targets", "path"), TIED, ids=["gpt2", "llama", "llama_head"])
@pytest.mark.parametrize("fails", [False, True])
def test_within_merged_a_tie_is_undone_and_then_is_as_before(
    build: Callable[[], nn.Module], targets: list[str], path: str, fails: bool
) -> None:
    model, ids = _lora(build(), *targets), torch.arange(5)[None]
    before, expected = Snapshot(model), model(ids).logits
    with suppress(ZeroDivisionError), merged(model, untie=True):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
        assert not model.config.tie_word_embeddings
        _ = 1 / (not fails)
    before.assert_same(model)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings
    assert_identical(model(ids).logits, expected)


def test_what_is_tied_for_the_adapter_too_stays_tied_when_the_rest_is_untied() -> None:
    shared, x = nn.Linear(4, 4, bias=False), torch.randn(3, 4)
    net = nn.Sequential(shared, nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[2].weight = shared.weight
    inject(net, LoRA(r=2, target_modules=["0", "1"]))
    perturb(net)
    net[1].peft.default.load_state_dict(net[0].peft.default.state_dict())
    expected = net(x)
    merge(net, untie=True)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)
    assert net[0].weight is net[1].weight
    assert net[0].weight is not net[2].weight


def test_without_a_tie_to_undo_untie_changes_nothing_else() -> None:
    model, ids = _lora(tiny_models.llama(), "q_proj"), torch.arange(5)[None]
    expected = model(ids).logits
    merge(model, untie=True)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(r=2), IA3(target_modules=["0"]), OFT(block_size=2), LoHa(r=2)])
def test_beside_an_adapter_that_replaces_the_weight_merging_is_refused(method: Method) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    inject(net, method, "a")
    inject(net, SelectiveTuning(parameters=["weight"]), "b")
    with pytest.raises(NotMergeableError, match="the adapter 'b' acts there too"):
        merge(net, "a")


def test_beside_an_adapter_of_the_bias_only_what_leaves_the_bias_alone_merges() -> None:
    x = torch.randn(3, 4)
    for method, merges in ((LoRA(r=2), True), (DoRA(r=2), False), (IA3(target_modules=["0"]), False)):
        net = nn.Sequential(nn.Linear(4, 4))
        inject(net, method, "a")
        inject(net, BitFit(), "b")
        perturb(net)
        expected = net(x)
        if merges:
            merge(net, "a")
            torch.testing.assert_close(net(x), expected)
        else:
            with pytest.raises(NotMergeableError, match="the adapter 'b' acts there too"):
                merge(net, "a")
