"""BottleneckAdapter behind any named module, and in torch's and transformers' own machinery."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from perturbation import adapted
from snapshot import assert_identical
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import BottleneckAdapter, active, remove
from lightning_peft.checkpoints.ckpt import adapter_state

PRESETS = ["houlsby", "pfeiffer", "parallel", "adapter_plus"]


def behind(module: nn.Module, **fields: Any) -> tuple[nn.Module, nn.Module, Any]:
    """A module with a perturbed adapter behind it, a copy without, and the bottleneck."""
    base = copy.deepcopy(module).eval()
    model = adapted(nn.ModuleDict({"m": module}), BottleneckAdapter(target_modules=["m"], width=3, **fields))
    return model["m"], base, model["m"].peft.default.bottleneck


class Residual(nn.Module):
    """A block of a CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)) + x).relu()


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., Tensor]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9), F.conv1d),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 7), F.conv2d),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), (2, 2, 4, 3, 5), F.conv3d),
    "batch_norm": (lambda: nn.BatchNorm2d(6), (2, 6, 4, 5), F.conv2d),
    "group_norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 4, 5), F.conv2d),
    "block": (Residual, (2, 4, 6, 5), F.conv2d),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_behind_a_convolution_it_is_two_convolutions_of_one_pixel(name: str) -> None:
    build, shape, convolve = CONVOLUTIONS[name]
    module, base, b = behind(build(), nonlinearity="relu", scale="channel")
    x = torch.randn(shape)
    h = base(x)
    one = [1] * (h.dim() - 2)
    z = convolve(h, b.down.weight.reshape(*b.down.weight.shape, *one), b.down.bias).relu()
    f = convolve(z, b.up.weight.reshape(*b.up.weight.shape, *one), b.up.bias) * b.scale.reshape(-1, *one)
    assert f.abs().max() > 0.1
    torch.testing.assert_close(module(x), h + f, rtol=1e-4, atol=1e-5)


def test_a_batch_norm_keeps_its_statistics_behind_which_an_adapter_trains() -> None:
    module, _, _ = behind(Residual())
    before = module.norm.running_mean.clone()
    module.train()(torch.randn(2, 4, 6, 5)).sum().backward()
    assert torch.equal(module.norm.running_mean, before)
    assert module.peft.default.bottleneck.up.weight.grad.any()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_keeps_its_state_and_the_rest_of_its_output(build: Any, bidirectional: bool) -> None:
    module, base, b = behind(build(4, 6, batch_first=True, bidirectional=bidirectional))
    assert b.down.in_features == (12 if bidirectional else 6)
    x = torch.randn(2, 5, 4)
    (y, state), (h, expected) = module(x), base(x)
    torch.testing.assert_close(y, h + b.up(F.silu(b.down(h))))
    for now, then in zip(_each(state), _each(expected), strict=True):
        torch.testing.assert_close(now, then)


def _each(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def test_a_layer_that_is_called_by_name_or_without_a_batch() -> None:
    module, base, b = behind(nn.Linear(4, 6))
    x = torch.randn(4)
    h = base(x)
    torch.testing.assert_close(module(input=x), h + b.up(F.silu(b.down(h))))


def test_the_weights_inside_an_attention_stand_for_the_whole() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    h, weights = attention(x, x, x)
    model = adapted(nn.ModuleDict({"m": attention}), BottleneckAdapter(target_modules=["out_proj"], width=3))
    y, same = model["m"](x, x, x)
    b = attention.peft.default.bottleneck
    torch.testing.assert_close(y, h + b.up(F.silu(b.down(h))))
    torch.testing.assert_close(same, weights)


BLOCKS: dict[str, tuple[Callable[[], Any], str, dict[str, Tensor]]] = {
    "bert": (tiny_models.bert, "bert.encoder.layer.0", {"input_ids": torch.arange(1, 6)[None]}),
    "t5": (
        tiny_models.t5,
        "encoder.block.0",
        {"input_ids": torch.arange(1, 6)[None], "labels": torch.ones(1, 2).long()},
    ),
    "torch": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2),
        "layers.0",
        {"src": torch.ones(3, 2, 8)},
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_whole_block_is_a_named_module_whatever_it_returns(name: str) -> None:
    build, path, inputs = BLOCKS[name]
    model = build().eval()
    h: dict[str, Any] = {}
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, output: h.update(base=output))
    model(**inputs)
    hook.remove()
    adapted(model, BottleneckAdapter(target_modules=[path], width=3, modules_to_save=None))
    model.get_submodule(path).register_forward_hook(lambda module, args, output: h.update(now=output))
    model(**inputs)
    base, now = (value if isinstance(value, tuple) else (value,) for value in (h["base"], h["now"]))
    b = model.get_submodule(path).peft.default.bottleneck
    torch.testing.assert_close(now[0], base[0] + b.up(F.silu(b.down(base[0]))), rtol=1e-4, atol=1e-4)
    assert len(now) == len(base)


# Two adapters, checkpointing, compilation ----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_two_adapters_act_one_after_the_other_and_each_alone(preset: str) -> None:
    fields = {"preset": preset, "reduction_factor": 4, "after_attention": True}
    ids = torch.arange(1, 6)[None]
    model = tiny_models.bert().eval()
    plain = model(input_ids=ids).logits
    adapted(model, BottleneckAdapter(**fields), "a")
    alone = model(input_ids=ids).logits
    adapted(model, BottleneckAdapter(**fields), "b")
    both = model(input_ids=ids).logits
    with active(model, "b"):
        other = model(input_ids=ids).logits
    outputs = [plain, alone, other, both]
    assert all((x - y).abs().max() > 1e-4 for i, x in enumerate(outputs) for y in outputs[:i])
    remove(model, "b")
    assert_identical(model(input_ids=ids).logits, alone)
    remove(model, "a")
    assert_identical(model(input_ids=ids).logits, plain)


def test_two_parallel_adapters_add_what_each_makes_of_the_same_input() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True).eval()
    x = torch.randn(2, 5, 8)
    stream = x + layer.self_attn(*[layer.norm1(x)] * 3)[0]
    expected = layer(x)
    for name in ("a", "b"):
        adapted(layer, BottleneckAdapter(preset="parallel", width=3), name)
        b = layer.linear2.peft.get_submodule(name).bottleneck
        expected = expected + 4 * b.up(F.relu(b.down(stream)))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_checkpointing_by_transformers_gives_the_same_gradients(preset: str) -> None:
    model = tiny_models.llama()
    method = BottleneckAdapter(preset=preset, reduction_factor=4, after_attention=True, dropout=0.2)
    adapted(model, method).train()
    ids = torch.arange(1, 7)[None]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    # renamed within transformers 5
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    found = gradients()
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_checkpointing_that_stops_early_leaves_no_value_behind() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    adapted(layer, BottleneckAdapter(preset="parallel", width=3, after_attention=True))
    x = torch.randn(2, 5, 8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    taps = [module.tap for module in layer.modules() if hasattr(module, "tap")]
    assert len(taps) == 4
    expected = x.grad.clone()
    x.grad = None
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert all(tap is None or tap.take() is None for tap in taps)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True),
        lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
    ],
    ids=["pre", "post"],
)
@pytest.mark.parametrize("preset", ["parallel", "pfeiffer"])
def test_a_compiled_block_hands_the_stream_from_hook_to_hook(preset: str, build: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    layer = adapted(build(), BottleneckAdapter(preset=preset, width=3, after_attention=True, gating=True))
    x = torch.randn(2, 5, 8)
    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        output = run(x)
        output.square().sum().backward()
        results.append([output] + [p.grad.clone() for p in layer.parameters() if p.requires_grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_copy_uses_its_own_adapter_and_its_own_norm(preset: str, how: Callable[[Any], Any]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    adapted(layer, BottleneckAdapter(preset=preset, width=3, after_attention=True))
    x = torch.randn(2, 5, 8)
    duplicate, expected = how(layer), layer(x)
    assert_identical(duplicate(x), expected)
    with torch.no_grad():
        for parameter in layer.parameters():  # norms as well
            parameter.mul_(0.5)
    assert_identical(duplicate(x), expected)
    assert not torch.equal(layer(x), expected)
    assert adapter_state(duplicate).keys() == adapter_state(layer).keys()
