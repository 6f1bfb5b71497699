"""LoRA against its paper, in plain torch, and its fields."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from perturbation import perturb
from snapshot import Snapshot
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import DoRA, LoRA, inject, merge, remove
from lightning_peft.errors import ConfigError, NotApplicableError, TargetError

R, ALPHA = 3, 5.0

HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], dict[str, str]]] = {
    # how to build it, its input, and for each adapted weight the slot of its factors
    "linear": (lambda: nn.Linear(6, 7), lambda: (torch.randn(2, 4, 6),), {"weight": "default"}),
    "hf_conv1d": (lambda: Conv1D(7, 6), lambda: (torch.randn(2, 4, 6),), {"weight": "default"}),
    "embedding": (lambda: nn.Embedding(9, 5), lambda: (torch.randint(9, (2, 4)),), {"weight": "default"}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2), lambda: (torch.randn(2, 4, 11),), {"weight": "default"}),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 2), padding_mode="reflect"),
        lambda: (torch.randn(2, 4, 6, 7),),
        {"weight": "default"},
    ),
    "conv2d_groups_dilation": (  # peft's adapter has neither the groups nor the shape for them
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        lambda: (torch.randn(2, 4, 8, 9),),
        {"weight": "default"},
    ),
    "conv2d_depthwise": (
        lambda: nn.Conv2d(4, 8, 3, groups=4),
        lambda: (torch.randn(2, 4, 6, 7),),
        {"weight": "default"},
    ),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), lambda: (torch.randn(2, 2, 4, 3, 5),), {"weight": "default"}),
    "attention": (
        lambda: nn.MultiheadAttention(6, 2),
        lambda: (torch.randn(5, 2, 6), torch.randn(4, 2, 6), torch.randn(4, 2, 6)),
        {"in_proj_weight": "default:in_proj_weight", "out_proj.weight": "default:out_proj_weight"},
    ),
    "attention_kdim": (
        lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=5, batch_first=True),
        lambda: (torch.randn(2, 5, 6), torch.randn(2, 4, 4), torch.randn(2, 4, 5)),
        {f"{name}_weight": f"default:{name}_weight" for name in ("q_proj", "k_proj", "v_proj")}
        | {"out_proj.weight": "default:out_proj_weight"},
    ),
}


def _adapted(model: nn.Module, **fields: Any) -> nn.Module:
    inject(model, LoRA(**{"r": R, "alpha": ALPHA, "target_modules": ".*", "modules_to_save": None, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    return model.eval()


def _sequence() -> tuple[Tensor]:
    return (torch.randn(3, 4, 8),)


def _run(model: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    output = model(*args)
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", HOSTS)
def test_the_output_is_that_of_the_paper(name: str, rslora: bool) -> None:
    """W + s B A in place of W, with s = alpha / r, or alpha / sqrt(r)."""
    build, example, slots = HOSTS[name]
    model, args = build(), example()
    expected = copy.deepcopy(model).eval()
    _adapted(model, use_rslora=rslora)
    s = ALPHA / math.sqrt(R) if rslora else ALPHA / R
    for path, slot in slots.items():
        factors = model.peft.get_submodule(slot)
        product = s * factors.lora_B @ factors.lora_A  # (out, in)
        weight = expected.get_parameter(path)
        if isinstance(model, (Conv1D, nn.Embedding)):  # stored as (in, out)
            product = product.T
        with torch.no_grad():
            weight += product.reshape(weight.shape)
    torch.testing.assert_close(_run(model, args), _run(expected, args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HOSTS)
def test_the_gradients_are_those_of_the_paper(name: str) -> None:
    build, example, slots = HOSTS[name]
    model, args = build(), example()
    base = copy.deepcopy(model).eval()
    _adapted(model)
    _run(model, args).square().sum().backward()
    own: dict[str, tuple[Tensor, Tensor]] = {}
    weights = {}
    for path, slot in slots.items():
        factors = model.peft.get_submodule(slot)
        a, b = factors.lora_A.detach().clone().requires_grad_(), factors.lora_B.detach().clone().requires_grad_()
        weight = base.get_parameter(path)
        product = ALPHA / R * b @ a
        if isinstance(base, (Conv1D, nn.Embedding)):
            product = product.T
        weights[path] = weight.detach() + product.reshape(weight.shape)
        own[slot] = a, b
    output = torch.func.functional_call(base, weights, args)
    (output if isinstance(output, Tensor) else output[0]).square().sum().backward()
    for slot, (a, b) in own.items():
        factors = model.peft.get_submodule(slot)
        torch.testing.assert_close(factors.lora_A.grad, a.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(factors.lora_B.grad, b.grad, rtol=1e-3, atol=1e-3)


def test_b_starts_at_zero_and_a_as_a_linear_layer_would() -> None:
    model = nn.Sequential(nn.Linear(512, 16))
    inject(model, LoRA(r=64, target_modules=["0"], modules_to_save=None, rank_pattern={"0": 16}))
    factors = model[0].peft.default
    assert not factors.lora_B.any()
    bound = 1 / math.sqrt(512)  # kaiming uniform with a = sqrt(5)
    assert factors.lora_A.abs().max() <= bound
    torch.testing.assert_close(factors.lora_A.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.05, atol=0)


def test_for_an_embedding_a_starts_at_zero_and_b_does_not() -> None:
    model = nn.Sequential(nn.Embedding(50, 40))
    inject(model, LoRA(r=4, target_modules=["0"]))
    assert not model[0].peft.default.lora_A.any()
    torch.testing.assert_close(model[0].peft.default.lora_B.std(), torch.tensor(1.0), rtol=0.25, atol=0)


def test_a_padding_entry_gets_no_gradient() -> None:
    model = _adapted(nn.Sequential(nn.Embedding(6, 4, padding_idx=2)))
    model(torch.tensor([[1, 2, 2, 5]])).square().sum().backward()
    gradient = model[0].peft.default.lora_A.grad
    assert not gradient[:, 2].any()
    assert gradient[:, 1].any()


@pytest.mark.parametrize(
    ("build", "example"),
    [
        (tiny_models.bert, lambda: (torch.arange(1, 6)[None],)),
        (tiny_models.gpt2, lambda: (torch.arange(1, 6)[None],)),
        (tiny_models.t5, lambda: (torch.arange(1, 6)[None], None, torch.arange(1, 4)[None])),
        (tiny_models.vit, lambda: (torch.randn(1, 3, 8, 8),)),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2), _sequence),
        (lambda: nn.TransformerDecoderLayer(8, 2, 12), lambda: (*_sequence(), *_sequence())),
    ],
    ids=["bert", "gpt2", "t5", "vit", "encoder", "decoder"],
)
def test_every_single_adapter_acts(build: Callable[[], nn.Module], example: Callable[[], tuple[Any, ...]]) -> None:
    """None sits where its host is passed over, as in torch's fused paths."""
    model, args = build().eval(), example()
    inject(model, LoRA(r=2, modules_to_save=None))
    with torch.inference_mode():
        expected = _run(model, args)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.normal_()
                assert (_run(model, args) - expected).abs().max() > 1e-4, f"{name} does nothing"
                parameter.data.zero_()


def test_dropout_acts_on_the_adapters_input_and_in_train_only() -> None:
    x = torch.ones(1000, 8)
    model = _adapted(nn.Sequential(nn.Linear(8, 8)), dropout=0.5)
    base = nn.functional.linear(x, model[0].weight, model[0].bias)
    expected = model.eval()(x)
    torch.testing.assert_close(model(x), expected)
    dropped = model.train()(x)
    assert (dropped[1:] - dropped[0]).abs().max() > 0.1, "every row drops other features"
    # scaled up, so that the mean is what it was
    torch.testing.assert_close((dropped - base).mean(0), (expected - base)[0], rtol=0.2, atol=1.0)
    factors = model[0].peft.default
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        factors.lora_A[:, :R] = factors.lora_B[:R] = torch.eye(R)
    torch.manual_seed(5)
    kept = model(x)[:, :R] / (ALPHA / R)
    assert set(kept.unique().tolist()) == {0.0, 2.0}, "each feature is kept, twice as large, or dropped"
    assert 0.45 < kept.count_nonzero() / kept.numel() < 0.55
    torch.manual_seed(5)
    assert torch.equal(model(x)[:, :R] / (ALPHA / R), kept), "the seed of torch decides"
    assert not torch.equal(model(x)[:, :R] / (ALPHA / R), kept), "and each call drops other features"


def test_dropout_does_nothing_to_an_index() -> None:
    model, ids = _adapted(nn.Sequential(nn.Embedding(9, 5)), dropout=0.5), torch.arange(9)
    torch.testing.assert_close(model.train()(ids), model.eval()(ids))


def test_dropout_is_refused_where_there_is_no_input_to_drop_from() -> None:
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(NotApplicableError, match=r"dropout=0\.1 cannot act on 'in_proj': MultiheadAttention, or"):
        inject(attention, LoRA(r=2, dropout=0.1))
    assert "peft" not in attention._modules


def test_patterns_set_rank_and_alpha_of_single_layers() -> None:
    model = tiny_models.llama()
    report = inject(
        model,
        LoRA(
            r=2,
            alpha=4,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"v_proj": 4, r"layers\.1\.mlp\..*": 5},
            alpha_pattern={r"layers\.0\..*": 1.0},
        ),
    )
    found = {row.host: row.trainable for row in report.hosts}
    layer = model.model.layers
    assert layer[0].self_attn.q_proj.peft.default.scale == 0.5
    assert layer[1].self_attn.q_proj.peft.default.scale == 2.0
    assert layer[0].self_attn.v_proj.peft.default.scale == 0.25
    assert layer[1].self_attn.v_proj.peft.default.lora_A.shape == (4, 16)
    assert layer[0].mlp.down_proj.peft.default.lora_A.shape == (2, 24)
    assert layer[1].mlp.down_proj.peft.default.lora_A.shape == (5, 24)
    assert found["model.layers.1.mlp.down_proj"] == 5 * (24 + 16)


def test_the_first_pattern_that_matches_counts() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8)})
    inject(model, LoRA(r=1, rank_pattern={"a": 2, ".*": 3}))
    assert model["a"].peft.default.lora_A.shape == (2, 8)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_adapted_layer_is_an_error(field: str) -> None:
    model = tiny_models.llama()
    with pytest.raises(TargetError, match=rf"LoRA\.{field}: 'k_proj' matches none of the 2 adapted layers, such as"):
        inject(model, LoRA(target_modules=["q_proj"], **{field: {"q_proj": 2, "k_proj": 2}}))


def test_a_rank_above_a_layers_smaller_side_is_what_was_asked_for() -> None:
    net = nn.ModuleDict({"fc": nn.Linear(8, 20)})
    assert inject(net, LoRA(r=9, target_modules=["fc"])).trainable == 9 * 28
    x = torch.randn(3, 8)
    perturb(net)
    expected = net["fc"](x)
    merge(net)
    torch.testing.assert_close(net["fc"](x), expected)


def test_a_rank_of_the_smaller_side_is_allowed() -> None:
    assert inject(nn.ModuleDict({"fc": nn.Linear(8, 20)}), LoRA(r=8, target_modules=["fc"])).trainable == 8 * 28


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be at least 1 and whole, not 0"),
        ({"r": -1}, "r must be"),
        ({"r": 8.0}, "r must be at least 1 and whole, not 8.0"),
        ({"r": "8"}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": None}, "r must be"),
        ({"alpha": 0}, "alpha must be a number greater than 0, not 0"),
        ({"alpha": -16}, "alpha must be"),
        ({"alpha": math.inf}, "alpha must be"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"alpha": "16"}, "alpha must be"),
        ({"alpha": True}, "alpha must be"),
        ({"dropout": 1}, "dropout must be a probability: at least 0, less than 1, not 1"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": math.nan}, "dropout must be"),
        ({"dropout": "0.1"}, "dropout must be"),
        ({"dropout": True}, "dropout must be"),
        ({"use_rslora": 1}, "use_rslora must be true or false, not 1"),
        ({"use_rslora": "yes"}, "use_rslora must be"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern must be"),
        ({"rank_pattern": {"q": 2.0}}, "rank_pattern must be"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern must be keyed by suffixes or regular expressions"),
        ({"rank_pattern": {3: 2}}, "rank_pattern must be keyed by"),
        ({"rank_pattern": None}, "rank_pattern must be"),
        ({"rank_pattern": ["q"]}, "rank_pattern must be"),
        ({"alpha_pattern": {"q": -1.0}}, "alpha_pattern must be a number greater than 0"),
        ({"alpha_pattern": {"q": "2"}}, "alpha_pattern must be"),
        ({"alpha_pattern": {"[": 2}}, "alpha_pattern must be keyed by"),
        ({"alpha_pattern": 3}, "alpha_pattern must be"),
    ],
)
def test_a_field_out_of_range_is_an_error_that_shows_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"LoRA\.{message}"):
        LoRA(**fields)


def test_the_limits_themselves_are_allowed() -> None:
    LoRA(r=1, alpha=1e-9, dropout=0, rank_pattern={"q": 1}, alpha_pattern={"q": 1})
    LoRA(dropout=0.999, alpha=1)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_an_embedding_that_scales_what_it_looks_up_scales_the_update(method: type[LoRA]) -> None:
    model = tiny_models.gemma3().eval()
    ids = torch.arange(3, 9)[None]
    inject(model, method(r=2, target_modules=["embed_tokens"]))
    perturb(model)
    expected = model(ids).logits
    merge(model, untie=True)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


class Shifted(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward((ids + 1) % 8) + 1


class Remapped(nn.Embedding):
    """A vocabulary of which some was left out."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("place", torch.arange(8).flip(0))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.place[ids])


class Rectified(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).relu()


class Masked(nn.Embedding):
    """Multiplies by one number, and does something else."""

    scale = 2.0

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids) * self.scale
        rows[ids == 3] = 0
        return rows


class Spread(nn.Embedding):
    """Multiplies the indices."""

    step = 1

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.step * ids)


class Counting(nn.Embedding):
    """Notes that it ran, as nothing may make it do but a call."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(ids) * 2


@pytest.mark.parametrize("kind", [Shifted, Remapped, Rectified, Masked, Spread, Counting])
def test_a_table_that_may_do_something_else_is_adapted_in_its_weight_and_not_run(kind: type[nn.Embedding]) -> None:
    net, ids = nn.ModuleDict({"table": kind(8, 4)}), torch.arange(8)
    before = Snapshot(net)
    inject(net, LoRA(r=2, target_modules=["table"]))
    perturb(net)
    remove(net)
    before.assert_same(net)
    inject(net, LoRA(r=2, target_modules=["table"]))
    perturb(net)
    expected = net["table"](ids)
    merge(net)
    torch.testing.assert_close(net["table"](ids), expected)


def test_a_huge_number_is_an_error_of_the_field() -> None:
    for fields in ({"alpha": 10**400}, {"r": 10**30}, {"rank_pattern": {"fc": 2**64}}, {"layers": [10**20]}):
        with pytest.raises(ConfigError, match=r"LoRA\.\w+ must be a number of at most 64 bits, not "):
            LoRA(**fields)
    for r in (10**12, 10**18):
        with pytest.raises(ConfigError, match="no memory for the adapters of LoRA"):
            inject(nn.ModuleDict({"fc": nn.Linear(8, 8)}), LoRA(r=r))
