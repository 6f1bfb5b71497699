"""Every field of BottleneckAdapter: what it computes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.measuring import bytes_kept
from torch import Tensor, nn

from lightning_peft import BottleneckAdapter, inject
from lightning_peft.core.method import Method

NAMED = {"target_modules": ["0"], "reduction_factor": 2}
NONLINEARITIES = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "swish": lambda z: z / (1 + (-z).exp()),
    "silu": lambda z: z / (1 + (-z).exp()),
    "tanh": lambda z: (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()),
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "identity": lambda z: z,
}


def adapted(d: int = 8, **fields: Any) -> tuple[nn.Module, Any]:
    """A linear layer with an adapter that has random weights, and its bottleneck."""
    model = nn.Sequential(nn.Linear(6, d))
    inject(model, BottleneckAdapter(**{**NAMED, **fields}))
    bottleneck = model[0].peft.default.bottleneck
    for parameter in bottleneck.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval(), bottleneck


def base_output(model: Any, x: Tensor) -> Tensor:
    return F.linear(x, model[0].weight, model[0].bias)


def down_up(b: Any, z: Tensor, nonlinearity: str = "swish") -> Tensor:
    return NONLINEARITIES[nonlinearity](z @ b.down.weight.T + b.down.bias) @ b.up.weight.T + b.up.bias


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_the_nonlinearity_is_the_one_that_is_named(nonlinearity: str) -> None:
    model, b = adapted(nonlinearity=nonlinearity)
    x = torch.randn(2, 5, 6)
    h = base_output(model, x)
    torch.testing.assert_close(model(x), h + down_up(b, h, nonlinearity), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scale", "shape"), [("learned", (1,)), ("channel", (8,)), (0.25, None), (-3, None)])
def test_the_scale_is_fixed_or_learned(scale: Any, shape: tuple[int, ...] | None) -> None:
    model, b = adapted(scale=scale)
    x = torch.randn(2, 5, 6)
    h = base_output(model, x)
    torch.testing.assert_close(model(x), h + b.scale * down_up(b, h), rtol=1e-5, atol=1e-5)
    assert (b.scale == scale) if shape is None else (b.scale.shape == shape)
    assert ("scale" in dict(b.named_parameters())) == (shape is not None)
    fresh = nn.Sequential(nn.Linear(6, 8))
    inject(fresh, BottleneckAdapter(scale=scale, **NAMED))
    assert shape is None or torch.equal(fresh[0].peft.default.bottleneck.scale, torch.ones(shape))


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_layer_norm_of_its_own_stands_before_or_after_the_bottleneck(place: str) -> None:
    model, b = adapted(layer_norm=place, scale="channel")
    x = torch.randn(2, 5, 6)
    h = base_output(model, x)

    def norm(z: Tensor) -> Tensor:
        ln = b.norm_before if place == "before" else b.norm_after
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return z * ln.weight + ln.bias

    f = down_up(b, norm(h)) if place == "before" else norm(down_up(b, h))
    torch.testing.assert_close(model(x), h + b.scale * f, rtol=1e-4, atol=1e-4)


def test_a_gate_from_the_adapters_input_scales_what_it_adds() -> None:
    """Mean over the positions of sigmoid(w z + b), for each sequence by itself."""
    model, b = adapted(gating=True)
    x = torch.randn(3, 5, 6)
    h = base_output(model, x)
    gate = torch.stack([torch.sigmoid(row @ b.gate.weight[0] + b.gate.bias).mean() for row in h])
    torch.testing.assert_close(model(x), h + gate[:, None, None] * down_up(b, h), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x[:1]), model(x)[:1])  # whatever else is in the batch


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("preset", ["houlsby", "pfeiffer", "parallel", "adapter_plus"])
def test_a_gate_keeps_the_sequences_of_a_batch_apart(preset: str, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first).eval()
    inject(layer, BottleneckAdapter(preset=preset, gating=True, reduction_factor=2, init="bert", scale=1.0))
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    x = torch.randn(3, 5, 8)
    rows = x if batch_first else x.transpose(0, 1)
    together = layer(rows) if batch_first else layer(rows).transpose(0, 1)
    alone = layer(x[1:2]) if batch_first else layer(x[1:2].transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_bottleneck_and_in_training_only() -> None:
    model, b = adapted(dropout=0.5)
    x = torch.randn(2, 5, 6)
    h = base_output(model, x)
    torch.testing.assert_close(model(x), h + down_up(b, h))
    torch.manual_seed(4)
    found = model.train()(x)
    torch.manual_seed(4)
    kept = F.dropout(F.silu(b.down(h)), 0.5)
    assert (kept == 0).any()
    torch.testing.assert_close(found, h + b.up(kept))


def test_the_width_is_given_or_follows_the_reduction_factor() -> None:
    widths = {}
    for name, fields in {
        "third": {"reduction_factor": 3},
        "fraction": {"reduction_factor": 2.5},
        "none": {"reduction_factor": 1},
        "huge": {"reduction_factor": 1000},
        "given": {"width": 20, "reduction_factor": 3},
        "one": {"width": 1},
    }.items():
        widths[name] = adapted(d=16, **fields)[1].down.weight.shape[0]
    assert widths == {"third": 5, "fraction": 6, "none": 16, "huge": 1, "given": 20, "one": 1}


@pytest.mark.parametrize(("preset", "m"), [("houlsby", 48), ("pfeiffer", 48), ("parallel", 384), ("adapter_plus", 8)])
def test_a_preset_has_the_width_of_its_paper(preset: str, m: int) -> None:
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(768, 2, 3072)
        report = inject(layer, BottleneckAdapter(preset=preset))
    each = 2 * 768 * m + 768 + m + (768 if preset == "adapter_plus" else 0)
    assert report.trainable == each * (2 if preset == "houlsby" else 1)


def test_a_field_overrides_its_preset() -> None:
    method = BottleneckAdapter(preset="adapter_plus", scale=2, residual="before", nonlinearity="tanh")
    chosen = {name: method.choice(name) for name in ("reads", "residual", "scale", "nonlinearity", "reduction_factor")}
    assert chosen == {"reads": "sum", "residual": "before", "scale": 2, "nonlinearity": "tanh", "reduction_factor": 96}
    assert Method.from_config(method.to_config()) == method


@pytest.mark.parametrize("init", ["houlsby", "bert", "mam"])
def test_the_initialisation_is_the_one_that_is_named(init: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 256))
    method = BottleneckAdapter(target_modules=["0"], width=128, init=init)
    inject(model, method)
    b = model[0].peft.default.bottleneck
    assert not b.down.bias.any()
    assert not b.up.bias.any()
    assert method.starts_as_base == (init == "mam")
    if init == "mam":  # kaiming uniform with a = sqrt(5): as nn.Linear
        assert not b.up.weight.any()
        assert b.down.weight.abs().max() <= 1 / 16
        torch.testing.assert_close(b.down.weight.std(), torch.tensor(1 / 16 / math.sqrt(3)), rtol=0.05, atol=0)
        x = torch.randn(3, 6)
        assert torch.equal(model(x), base_output(model, x))
        return
    # cut at two standard deviations, a normal has 0.8796 of its own
    std, end = (0.01 * 0.8796, 0.02) if init == "houlsby" else (0.02, math.inf)
    for layer in (b.down, b.up):
        torch.testing.assert_close(layer.weight.std(), torch.tensor(std), rtol=0.05, atol=0)
        assert layer.weight.abs().max() <= end


@pytest.mark.parametrize("scale", ["learned", "channel"])
def test_for_a_learned_scale_nothing_as_large_as_the_stream_is_kept(scale: str) -> None:
    width, bottleneck, kept = 16, 4, {}
    for each in (1.0, scale):
        model = nn.Sequential(nn.Linear(width, width))
        inject(model, BottleneckAdapter(target_modules=["0"], width=bottleneck, scale=each))
        kept[each] = bytes_kept(model, lambda: model(torch.randn(100, width)).sum())  # noqa: B023
    assert kept[scale] - kept[1.0] == 4 * width * bottleneck, "the scaled weight alone"
