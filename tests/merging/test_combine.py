"""A new adapter out of others, against peft's ``add_weighted_adapter`` on the same weights."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny_models
import torch
from peft.utils import merge_utils
from perturbation import perturb
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    BitFit,
    BottleneckAdapter,
    LayerNormTuning,
    LoRA,
    Method,
    PromptTuning,
    SelectiveTuning,
    active,
    active_adapters,
    combine,
    inject,
    merge,
    route,
)
from lightning_peft.checkpoints.ckpt import adapter_state
from lightning_peft.core.recipes import Recipe
from lightning_peft.errors import AdapterNameError, ConfigError, NotApplicableError
from lightning_peft.injection.registry import find_adapter
from lightning_peft.injection.slots import named_slots

# peft's, on the newest transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (tiny_models.llama, ["q_proj", "o_proj", "down_proj"]),
    "gpt2": (tiny_models.gpt2, ["c_attn", "c_fc", "wte"]),
}


def _pair(model: str, fields: dict[str, dict[str, Any]]) -> tuple[nn.Module, Any]:
    """Our model and peft's with LoRA adapters of these settings, and the same random values in both."""
    build, targets = MODELS[model]
    ours = build().eval()
    theirs: Any = copy.deepcopy(ours)
    for name, own in fields.items():
        inject(ours, LoRA(target_modules=targets, **own), name)
        options = {"r": own["r"], "lora_alpha": own["alpha"], "use_rslora": own.get("use_rslora", False)}
        config = peft.LoraConfig(target_modules=targets, fan_in_fan_out=model == "gpt2", **options)
        if isinstance(theirs, peft.PeftModel):
            theirs.add_adapter(name, config)
        else:
            theirs = peft.get_peft_model(theirs, config, adapter_name=name)
    layers = {path.removeprefix("base_model.model."): layer for path, layer in theirs.named_modules()}
    with torch.no_grad():
        for path, _, slots in named_slots(ours):
            for name, adapter in slots.named_children():
                layer, table = layers[path], name in layers[path].lora_embedding_A
                a = layer.lora_embedding_A[name] if table else layer.lora_A[name].weight
                b = layer.lora_embedding_B[name] if table else layer.lora_B[name].weight
                a.copy_(adapter.lora_A.normal_(std=0.3))
                b.copy_(adapter.lora_B.normal_(std=0.3))
    return ours, theirs.eval()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5), (-1.2, -0.4), (0.0, 2.0)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("svd", {"rank": 2}),
        ("ties", {"density": 0.4}),
        ("magnitude_prune", {"density": 0.3}),
    ],
)
def test_the_output_is_that_of_pefts_weighted_adapter(
    model: str, weights: tuple[float, float], method: str, options: dict[str, Any]
) -> None:
    fields = {"one": {"r": 3, "alpha": 5.0}, "two": {"r": 3, "alpha": 2.0, "use_rslora": True}}
    ours, theirs = _pair(model, fields)
    combine(ours, dict(zip(fields, weights, strict=True)), method, "both", **options)
    extra = {"svd_rank": options.get("rank"), "density": options.get("density")}
    theirs.add_weighted_adapter(list(fields), list(weights), "both", combination_type=method, **extra)
    theirs.set_adapter("both")
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 6))
    with active(ours, "both"), torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_unequal_ranks_combine_as_in_peft(method: str) -> None:
    ours, theirs = _pair("llama", {"one": {"r": 2, "alpha": 3.0}, "two": {"r": 5, "alpha": 4.0}})
    combine(ours, {"one": 0.6, "two": -0.9}, method, "both")
    theirs.add_weighted_adapter(["one", "two"], [0.6, -0.9], "both", combination_type=method)
    theirs.set_adapter("both")
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 6))
    with active(ours, "both"), torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert find_adapter(ours, "both")[2].attachments["both"].method.r == {"cat": 7, "svd": 5}[method]


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_the_random_recipes_are_pefts_for_the_same_mask(name: str, density: float) -> None:
    changes, weights = [torch.randn(6, 9) for _ in range(3)], (0.5, -1.0, 2.0)
    generator = torch.Generator().manual_seed(4)
    found = Recipe(name=name, weights=weights, density=density, generator=generator).mix(changes)
    torch.manual_seed(4)
    expected = getattr(merge_utils, name)(changes, torch.tensor(weights), density)
    torch.testing.assert_close(found, expected)
    assert (found == 0).any()


def test_what_is_kept_at_random_is_the_share_and_stays_the_same_on_average() -> None:
    change = torch.ones(400, 500)
    kept = Recipe(name="dare_linear", weights=(1.0,), density=0.25).mix([change])
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert kept.mean().item() == pytest.approx(1, abs=0.02)


def test_a_seed_decides_what_is_kept() -> None:
    model = _loras()
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        combine(model, {"a": 1.0, "b": 1.0}, "dare_linear", name, density=0.5, seed=seed)
    one, same, other = (model[0].peft.get_submodule(name).lora_A for name in ("one", "same", "other"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def _loras(**fields: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    for i, name in enumerate("ab"):
        inject(model, LoRA(**{"r": 2, "alpha": 3.0 + i, **fields}), name)
        perturb(model, name, 0.05)
    return model.eval()


def test_a_negative_weight_takes_a_task_out_of_the_base() -> None:
    model = _loras()
    weight, change = model[0].weight.clone(), 1.5 * model[0].peft.a.lora_B @ model[0].peft.a.lora_A
    combine(model, {"a": -1.0}, name="without")
    merge(model, "without")
    torch.testing.assert_close(model[0].weight, weight - change)


def test_cat_is_exact_where_its_ranks_are_more_than_a_layer_allows() -> None:
    model, x = _loras(r=4), torch.randn(3, 6)
    expected = model[0].weight + sum(
        w * adapter.scale * adapter.lora_B @ adapter.lora_A
        for w, adapter in ((0.5, model[0].peft.a), (2.0, model[0].peft.b))
    )
    combine(model, {"a": 0.5, "b": 2.0}, "cat", "ab")
    with active(model, "ab"):
        torch.testing.assert_close(model[0](x), nn.functional.linear(x, expected, model[0].bias), rtol=1e-5, atol=1e-5)
    assert [len(model[i].peft.ab.lora_A) for i in (0, 2)] == [5, 4]


@pytest.mark.parametrize("method", ["linear", "cat"])
def test_its_config_builds_adapters_that_take_its_state(method: str) -> None:
    model, x = _loras(rank_pattern={"0": 3}, alpha_pattern={"2": 9.0}, use_rslora=True), torch.randn(3, 6)
    combine(model, {"a": 0.5, "b": 2.0}, method, "ab")
    made = find_adapter(model, "ab")[2].attachments["ab"].method
    fresh = copy.deepcopy(nn.Sequential(*[nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)]))
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if ".peft." not in key})
    inject(fresh, Method.from_config(made.to_config()), "ab")
    fresh.load_state_dict({key: value for key, value in adapter_state(model).items() if ".peft.ab." in key})
    with active(model, "ab"):
        torch.testing.assert_close(fresh.eval()(x), model(x), rtol=1e-6, atol=1e-6)


def test_the_new_adapter_waits_and_the_others_stay() -> None:
    model, x = _loras(), torch.randn(3, 6)
    before, expected, training = Snapshot(model), model(x), {n for n, p in model.named_parameters() if p.requires_grad}
    combine(model, {"a": 1.0, "b": 1.0}, "linear", "ab")
    assert torch.equal(model(x), expected)
    assert active_adapters(model) == ("a", "b")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.state.items())
    with route(model, ["a", "ab", None]):
        assert len(model(x).unique(dim=0)) == 3


ADDED: dict[str, tuple[Method, str]] = {
    "ia3": (IA3(), "linear"),
    "biases": (BitFit(), "linear"),
    "norms": (LayerNormTuning(), "linear"),
    "entries": (SelectiveTuning(density=0.3, target_modules=["query"]), "linear"),
    "tokens": (SelectiveTuning(token_ids=[3, 7]), "linear"),
    "head beside cat": (LoRA(r=2, target_modules=["query"]), "cat"),
    "ties of biases": (BitFit(), "ties"),
}


@pytest.mark.parametrize("case", ADDED)
def test_what_changes_the_base_combines_by_its_changes(case: str) -> None:
    method, how = ADDED[case]
    model = tiny_models.bert()
    for name in "ab":
        inject(model, method, name)
        perturb(model, name, 0.05)
    state, base = adapter_state(model), model.state_dict()
    combine(model, {"a": 0.5, "b": -2.0}, how, "ab", density=0.6 if how == "ties" else None)
    found = {key: value for key, value in adapter_state(model).items() if ".peft.ab" in key and ".lora_" not in key}
    assert found
    for key, value in found.items():
        one, two = (state[key.replace(".peft.ab", f".peft.{name}")] for name in "ab")
        path, leaf = key.partition(".peft.")[0], key.rpartition(".")[2]
        if value.dtype == torch.int64:  # which entries
            assert torch.equal(value, one)
            continue
        start = _start(case, base, f"{path}.{leaf}", key, state)
        changes = [one - start, two - start]
        if how == "ties":
            expected = start + merge_utils.ties(changes, torch.tensor([0.5, -2.0]), 0.6)
        else:
            expected = start + 0.5 * changes[0] - 2.0 * changes[1]
        torch.testing.assert_close(value, expected)


def _start(case: str, base: dict[str, Tensor], name: str, key: str, state: dict[str, Tensor]) -> Tensor:
    """The values with which an adapter's parameters change nothing."""
    if case == "ia3" and name.endswith("ia3_l"):
        return torch.ones(())
    if name.endswith(".values"):
        weight = base[f"{key.partition('.peft.')[0]}.weight"]
        index = state[key.replace(".peft.ab", ".peft.a").replace("values", "index")]
        return weight[index] if case == "tokens" else weight.flatten()[index]
    return base[name]


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ({"a": 1.0, "c": 1.0}, {}, AdapterNameError, "no adapter 'c'"),
        ({"a": 1.0}, {"name": "b"}, AdapterNameError, "There is an adapter 'b' already"),
        ({"a": 1.0}, {"name": "a.b"}, AdapterNameError, "cannot be the name"),
        ({}, {}, ConfigError, "needs adapters and their weights"),
        (["a", "b"], {}, ConfigError, "needs adapters and their weights"),
        ({"a": float("nan")}, {}, ConfigError, "weight of 'a' must be a finite number, not nan"),
        ({"a": float("inf")}, {}, ConfigError, "weight of 'a' must be a finite number"),
        ({"a": "1"}, {}, ConfigError, "weight of 'a' must be a finite number, not '1'"),
        ({"a": 1.0}, {"method": "linaer"}, ConfigError, "Did you mean 'linear'"),
        ({"a": 1.0}, {"method": "ties"}, ConfigError, "needs density, greater than 0 and at most 1, not None"),
        ({"a": 1.0}, {"method": "dare_ties", "density": 0.0}, ConfigError, "needs density"),
        ({"a": 1.0}, {"method": "ties", "density": 1.5}, ConfigError, "needs density"),
        ({"a": 1.0}, {"density": 0.5}, ConfigError, "'linear' keeps every entry"),
        ({"a": 1.0}, {"method": "cat", "rank": 2}, ConfigError, "rank is for 'svd'"),
        ({"a": 1.0}, {"method": "svd", "rank": 0}, ConfigError, "at least 1"),
        ({"a": 1.0}, {"method": "svd", "rank": 3}, ConfigError, "rank=3 is more than the 2"),
        (
            {"a": 1.0, "ranks": 1.0},
            {},
            NotApplicableError,
            "'0' cannot be combined: the ranks are 2, 3.*'svd' or 'cat'",
        ),
        ({"a": 1.0, "ia3": 1.0}, {}, NotApplicableError, "'a' is LoRA and 'ia3' is IA3"),
        ({"a": 1.0, "hosts": 1.0}, {}, NotApplicableError, "of 'a' and 'hosts', only 'a' adapts '2'"),
        ({"gated": 1.0}, {}, NotApplicableError, "a gate scales it"),
        ({"mlp": 1.0}, {}, NotApplicableError, "BottleneckAdapter on '0' cannot be combined.*do not add up"),
        ({"ia3": 1.0}, {"method": "svd"}, NotApplicableError, "'svd' is for low-rank factors"),
        ({"broken": 1.0}, {}, NotApplicableError, "'0' gives values that are not finite"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_changes_nothing(
    weights: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = _loras()
    inject(model, LoRA(r=3), "ranks")
    inject(model, LoRA(r=2, target_modules=["0"]), "hosts")
    inject(model, LoRA(r=2, gating=True), "gated")
    inject(model, IA3(target_modules=["0", "2"]), "ia3")
    inject(model, BottleneckAdapter(target_modules=["0", "2"]), "mlp")
    inject(model, LoRA(r=2), "broken")
    nn.init.constant_(model[0].peft.broken.lora_A, torch.inf)
    before, acting = Snapshot(model), active_adapters(model)
    with pytest.raises(error, match=message):
        combine(model, weights, **options)
    before.assert_same(model)
    assert active_adapters(model) == acting


def test_prompts_and_statistics_do_not_add_up() -> None:
    model = tiny_models.llama()
    inject(model, PromptTuning(num_virtual_tokens=2), "a")
    with pytest.raises(NotApplicableError, match="tokens of their own"):
        combine(model, {"a": 1.0}, name="b")
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    inject(net, LoRA(r=2, target_modules=["0"], modules_to_save=["1"]), "a")
    with pytest.raises(NotApplicableError, match="'1' cannot be combined: it has statistics of its own"):
        combine(net, {"a": 1.0}, name="b")
