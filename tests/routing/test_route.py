"""One batch, many adapters: each row has its own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import MethodType

import pytest
import tiny_models
import torch
import transformers as hf
from perturbation import perturb
from placing import Place, Scale, ScaleInput, ScaleWeight, Shift
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    BitFit,
    BottleneckAdapter,
    LayerNormTuning,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    activate,
    active,
    active_adapters,
    disabled,
    eject,
    inject,
    merge,
    remove,
    route,
)
from lightning_peft.errors import AdapterNameError, ConfigError, NotApplicableError

Names = Sequence[str | None]
MIX: dict[str, Method] = {
    "lora": LoRA(r=2, target_modules="all-linear"),
    "wide": LoRA(r=4, alpha=3.0, target_modules="all-linear", use_rslora=True),
    "ia3": IA3(),
    "bottleneck": BottleneckAdapter(preset="pfeiffer", reduction_factor=4.0),
    "parallel": BottleneckAdapter(preset="parallel"),
    "norms": LayerNormTuning(),
    "prefix": PrefixTuning(num_virtual_tokens=2),
    "prompt": PromptTuning(num_virtual_tokens=3),
    "longer": PTuning(num_virtual_tokens=5),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def _with(model: nn.Module, methods: dict[str, Method]) -> nn.Module:
    for name, method in methods.items():
        inject(model, method, name)
        perturb(model, name, 0.05)
    return model.eval()


def _alone(model: nn.Module, names: Names, run: Callable[[int], Tensor]) -> Tensor:
    """What each row gives by itself, with its own adapter."""
    outputs = []
    for row, name in enumerate(names):
        with active(model, name) if name else disabled(model):
            outputs.append(run(row))
    return torch.cat(outputs)


def _ids(rows: int, length: int = 6) -> Tensor:
    return torch.randint(3, tiny_models.VOCABULARY, (rows, length))


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gpt2, tiny_models.bert, tiny_models.t5])
def test_any_mix_of_methods_equals_each_alone(build: Callable[[], nn.Module]) -> None:
    model = build()
    mix = {**MIX, "biases": BitFit()} if build is tiny_models.bert else MIX
    model = _with(model, mix)
    names = [None, *mix, *mix, None]
    names = [names[i] for i in torch.randperm(len(names))]
    ids, mask = _ids(len(names)), torch.ones(len(names), 6, dtype=torch.int64)
    mask[::3, 4:] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    if build is tiny_models.t5:
        call["decoder_input_ids"] = _ids(len(names), 4)
    with route(model, names):
        found = model(**call).logits
    expected = _alone(model, names, lambda i: model(**{key: value[i : i + 1] for key, value in call.items()}).logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len({tuple(row.flatten().tolist()) for row in found}) == len(names)


@pytest.mark.parametrize("length", [3, 20])
def test_training_gives_each_adapter_the_gradient_of_its_rows(length: int) -> None:
    head = partial(hf.BertForSequenceClassification, hf.BertConfig(**_BERT))
    model = _with(head(), {"a": MIX["lora"], "b": MIX["wide"], "c": IA3(), "d": BitFit()})
    names, ids = ["a", None, "c", "b", "a", "d", "b"], _ids(7, length)
    weights = torch.linspace(0.5, 1.5, 7)[:, None]

    def gradients() -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    model.train()
    with route(model, names):
        (model(ids).logits * weights).square().sum().backward()
    found = gradients()
    for i, name in enumerate(names):
        if name:
            with active(model, name):
                (model(ids[i : i + 1]).logits * weights[i]).square().sum().backward()
    expected = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (6, 20, 4), (6, 5, 7, 4)])
@pytest.mark.parametrize("records", [True, False])
def test_ranks_and_scales_of_lora_may_differ_in_both_of_its_forms(shape: tuple[int, ...], records: bool) -> None:
    net = _with(nn.Sequential(nn.Linear(4, 5)), {f"r{r}": LoRA(r=r, alpha=2.0 * r**2) for r in (1, 2, 4)})
    names, x = ["r4", None, "r1", "r2", "r4", "r1"], torch.randn(shape)
    with torch.set_grad_enabled(records):
        with route(net, names):
            found = net(x)
        torch.testing.assert_close(found, _alone(net, names, lambda i: net(x[i : i + 1])), rtol=1e-5, atol=1e-6)


def test_dropout_that_is_the_same_everywhere_drops_anew_and_scales() -> None:
    net = _with(nn.Sequential(nn.Linear(4, 4)), {name: LoRA(r=2, dropout=0.5) for name in "ab"}).train()
    x = torch.ones(40, 2, 4)
    torch.nn.init.ones_(net[0].peft.b.lora_A)
    torch.nn.init.ones_(net[0].peft.b.lora_B)
    with route(net, ["b"] * 39 + [None]):
        added = net(x) - nn.functional.linear(x, net[0].weight, net[0].bias)
    assert set((added[:-1, :, 0] / 16).round().tolist()[0]) <= set(range(0, 17, 1))
    with route(net, ["a", "b"] * 20):
        torch.manual_seed(0)
        one, two = net(x), net(x)
    assert not torch.equal(one, two)


def test_the_host_runs_once_for_adapters_of_its_output_and_once_each_for_the_others(x: Tensor) -> None:
    net, calls = nn.Sequential(nn.Linear(4, 4)), []
    adapters = {"scale": Scale, "shift": Shift, "input": ScaleInput, "weight": partial(ScaleWeight, "weight")}
    run = nn.Linear.forward
    net[0].forward = MethodType(lambda self, x: calls.append(len(x)) or run(self, x), net[0])
    for name, adapter in adapters.items():
        inject(net, Place(adapters={"0": adapter}), name)
    with route(net, ["scale", "shift", None, "scale", "shift"]):
        net(x)
    assert calls == [5]
    calls.clear()
    names = ["scale", "input", "shift", "input", "weight"]
    with route(net, names):
        found = net(x)
    assert sorted(calls) == [1, 2, 2]
    torch.testing.assert_close(found, _alone(net, names, lambda i: net(x[i : i + 1])))


class Flattening(nn.Module):
    """Sees all places of all rows as one long batch in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        y = self.second(self.first(x).flatten(0, 1)).view_as(x)
        return y if table is None else y + self.table(table).sum()


@pytest.mark.filterwarnings("ignore:Adapted layers that have not run.*'table'")
@pytest.mark.parametrize("second", [LoRA(r=2), IA3(target_modules=["first", "second"]), BitFit()])
def test_flattened_rows_are_told_by_their_length(second: Method) -> None:
    net, names, x = _with(Flattening(), {"a": LoRA(r=2), "b": second}), ["b", "a", None], torch.randn(3, 5, 4)
    with route(net, names):
        found = net(x)
        with pytest.raises(ConfigError, match=r"'table' is called with a tensor of shape \(6, 4\).*first dimension"):
            net(x, torch.randn(6, 4))
    torch.testing.assert_close(found, _alone(net, names, lambda i: net(x[i : i + 1])), rtol=1e-5, atol=1e-6)


def test_states_of_a_recurrent_layer_are_put_together_too() -> None:
    lstm = _with(nn.LSTM(3, 4, 2, batch_first=True), {name: BitFit() for name in "ab"})
    names, x, state = ["b", None, "a", "b", "a"], torch.randn(5, 6, 3), (torch.randn(2, 5, 4), torch.randn(2, 5, 4))
    with route(lstm, names):
        out, (h, c) = lstm(x, state)
    for i, name in enumerate(names):
        with active(lstm, name) if name else disabled(lstm):
            one, (h_one, c_one) = lstm(x[i : i + 1], tuple(s[:, i : i + 1] for s in state))
        for found, expected in ((out[i], one[0]), (h[:, i], h_one[:, 0]), (c[:, i], c_one[:, 0])):
            torch.testing.assert_close(found, expected)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 6, 6, 6, 6]), batch_first=True)
    with route(lstm, names), pytest.raises(NotApplicableError, match="PackedSequence"):
        lstm(packed)


@pytest.mark.compat
@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gemma3, tiny_models.gpt2])
def test_a_mixed_batch_generates_with_its_cache(build: Callable[[], nn.Module]) -> None:
    model = _with(build(), {name: MIX[name] for name in ("lora", "ia3", "prefix", "bottleneck")})
    names, ids = ["prefix", "lora", None, "ia3", "bottleneck", "prefix"], _ids(6)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    every = torch.ones_like(ids)
    with route(model, names):
        found = model.generate(ids, attention_mask=every, **options)
    alone = partial(model.generate, attention_mask=every[:1], **options)
    assert torch.equal(found, _alone(model, names, lambda i: alone(ids[i : i + 1])))


@pytest.mark.compat
def test_prompts_of_different_lengths_generate_without_a_cache_and_say_so_with_one() -> None:
    model = _with(tiny_models.llama(), {name: MIX[name] for name in ("lora", "prompt", "longer")})
    names, ids = ["prompt", "lora", "longer", None], _ids(4)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with route(model, names):
        found = model.generate(ids, use_cache=False, **options)
        with pytest.raises(NotApplicableError, match=r"rows have 9, 6, 11 tokens in it.*use_cache=False"):
            model.generate(ids, **options)
    alone = partial(model.generate, use_cache=False, **options)
    assert torch.equal(found, _alone(model, names, lambda i: alone(ids[i : i + 1])))


def test_a_loss_of_all_rows_is_refused_only_where_the_whole_model_runs_by_adapter() -> None:
    model, ids = _with(tiny_models.llama(), {name: MIX[name] for name in ("lora", "norms", "prompt")}), _ids(3)
    with route(model, ["lora", "norms", None]):
        assert model(ids, labels=ids).loss.isfinite()
    with route(model, ["lora", "prompt", None]), pytest.raises(NotApplicableError, match=r"such as a loss.*outside"):
        model(ids, labels=ids)


def test_adapters_of_two_parts_are_routed_from_the_whole(x: Tensor) -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    inject(net[0], Place(adapters={"0": Scale}), "left")
    inject(net[1], Place(adapters={"0": partial(ScaleWeight, "weight")}), "right")
    names = ["left", "right", None, "left", "right"]
    with route(net, names):
        found = net(x)
    torch.testing.assert_close(found, _alone(net, names, lambda i: net(x[i : i + 1])))


def _routed(net: nn.Module, x: Tensor) -> AbstractContextManager[None]:
    for name, adapter in {"scale": Scale, "weight": partial(ScaleWeight, "weight")}.items():
        inject(net, Place(adapters={"0": adapter}), name)
    activate(net, "scale")
    return route(net, ["scale", "weight", None, "scale", "weight"])


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_everything_is_as_it_was(x: Tensor, fails: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    untouched, block = Snapshot(net), _routed(net, x)
    with route(net, ["scale"] * 5):  # its hooks stay: another thread may be in a forward
        net(x)
    before, expected = Snapshot(net), net(x)
    if fails:
        net[1].forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError), block:
            net(x)
        del net[1].forward
    else:
        with block:
            net(x)
    before.assert_same(net)
    assert active_adapters(net) == ("scale",)
    assert torch.equal(net(x), expected)
    remove(net, "scale")
    remove(net, "weight")
    untouched.assert_same(net)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: activate(net, "scale"),
        lambda net: active(net, "scale").__enter__(),
        lambda net: disabled(net).__enter__(),
        lambda net: route(net, ["scale"]).__enter__(),
        lambda net: inject(net, Place(adapters={"0": Scale}), "more"),
        lambda net: remove(net, "scale"),
        lambda net: merge(net, "weight"),
        lambda net: eject(net, "scale"),
    ],
    ids=["activate", "active", "disabled", "route", "inject", "remove", "merge", "eject"],
)
def test_within_the_block_adapters_stay_as_they_are(x: Tensor, change: Callable[[nn.Module], object]) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with _routed(net, x):
        expected = net(x)
        with pytest.raises(AdapterNameError, match=r"leave the route\(\.\.\.\) block first"):
            change(net)
        assert torch.equal(net(x), expected)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["scale", "weihgt", None], AdapterNameError, r"no adapter 'weihgt'.*Did you mean 'weight'"),
        ([], ConfigError, "needs a list of adapter names"),
        ("scale", ConfigError, "needs a list of adapter names.*not 'scale'"),
        (["scale", 3], ConfigError, "or None for the base, not 3"),
        (["scale", None], ConfigError, r"names for 2 rows, and Sequential was called with 5"),
        ([None, None], ConfigError, r"names for 2 rows, and Sequential was called with 5"),
        (["weight"] * 10, ConfigError, r"names for 10 rows, and Sequential was called with 5"),
    ],
)
def test_wrong_names_and_other_numbers_of_rows_are_errors(
    x: Tensor, names: Names, error: type[Exception], message: str
) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with _routed(net, x):  # the hooks of a first route stay
        before = Snapshot(net)
    with pytest.raises(error, match=message), route(net, names):
        net(x)
    before.assert_same(net)


def test_where_the_second_dimension_counts_rows_it_is_refused() -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8))
    inject(net, LoRA(r=2))
    with (
        pytest.raises(NotApplicableError, match=r"'0.self_attn' \(MultiheadAttention\) has batch_first=False"),
        route(net, ["default"]),
    ):
        pytest.fail("the rows cannot be told")
