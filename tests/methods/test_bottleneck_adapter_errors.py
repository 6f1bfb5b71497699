"""What BottleneckAdapter refuses, and how the choice of blocks is narrowed."""

import math
from typing import Any

import pytest
import tiny_models
import torch
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import BottleneckAdapter, inject
from lightning_peft.errors import ConfigError, NotApplicableError, TargetError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "houlsbi"}, r"has no preset 'houlsbi'; presets: houlsby, .*Did you mean 'houlsby'\?"),
        ({"preset": None}, "has no preset None"),
        ({"preset": ["houlsby"]}, "has no preset"),
        ({"reads": "residual"}, r"reads must be one of 'output', 'sum', 'input', or null, not 'residual'"),
        ({"reads": ["sum"]}, "reads must be"),
        ({"residual": "behind"}, "residual must be one of 'before', 'after', or null, not 'behind'"),
        ({"residual": "after"}, r"residual must be 'before' unless reads='sum'.*, not 'after'"),
        ({"preset": "parallel", "residual": "after"}, "residual must be 'before' unless"),
        ({"preset": "adapter_plus", "reads": "output"}, "residual must be 'before' unless"),
        ({"nonlinearity": "rlu"}, "nonlinearity must be one of 'relu', .*not 'rlu'"),
        ({"init": "xavier"}, "init must be"),
        ({"layer_norm": "both"}, "layer_norm must be one of 'before', 'after', or null"),
        ({"reduction_factor": 0.5}, "reduction_factor must be a number, at least 1, or null, not 0.5"),
        ({"reduction_factor": 0}, "reduction_factor must be"),
        ({"reduction_factor": math.inf}, "reduction_factor must be"),
        ({"reduction_factor": math.nan}, "reduction_factor must be"),
        ({"reduction_factor": "16"}, "reduction_factor must be"),
        ({"reduction_factor": True}, "reduction_factor must be"),
        ({"width": 0}, "width must be at least 1 and whole, or null, not 0"),
        ({"width": -4}, "width must be"),
        ({"width": 8.0}, "width must be"),
        ({"width": True}, "width must be"),
        ({"scale": 0}, "scale must be one of 'learned', 'channel', or a number other than 0, or null, not 0"),
        ({"scale": 0.0}, "scale must be"),
        ({"scale": math.nan}, "scale must be"),
        ({"scale": "fixed"}, "scale must be"),
        ({"scale": True}, "scale must be"),
        ({"dropout": 1}, "dropout must be a probability"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": None}, "dropout must be"),
        ({"gating": 1}, "gating must be true or false, not 1"),
        ({"after_cross_attention": None}, "after_cross_attention must be"),
        ({"after_attention": "yes"}, "after_attention must be true or false, or null"),
        ({"after_ffn": 0}, "after_ffn must be"),
        ({"layers": []}, "layers must be"),
        ({"target_modules": ""}, "target_modules must be"),
        ({"target_modules": [""]}, "target_modules must be"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_an_error_that_shows_it(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"BottleneckAdapter(\.| ){message}"):
        BottleneckAdapter(**fields)


def test_without_a_place_there_is_no_adapter() -> None:
    with pytest.raises(ConfigError, match="one of after_attention, after_ffn, after_cross_attention must be true"):
        BottleneckAdapter(preset="pfeiffer", after_ffn=False)
    BottleneckAdapter(preset="pfeiffer", after_ffn=False, after_cross_attention=True)


@pytest.mark.parametrize("name", ["cnn", "mlp", "lstm"])
def test_a_model_without_blocks_needs_names(name: str) -> None:
    model: nn.Module = {
        "cnn": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
        "mlp": nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        "lstm": nn.LSTM(4, 4),
    }[name]
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=r"finds no transformer blocks with such a part in .*target_modules"):
        inject(model, BottleneckAdapter())
    before.assert_same(model)


def test_a_part_that_is_asked_for_and_not_there_is_an_error() -> None:
    model = tiny_models.bert()
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=r"after_cross_attention=True.* finds no .* in BertForSequence"):
        inject(model, BottleneckAdapter(after_cross_attention=True))
    before.assert_same(model)
    alone = nn.MultiheadAttention(8, 2)  # an attention without a feedforward part
    with pytest.raises(NotApplicableError, match=r"after_ffn=True\) finds no .* Set after_ffn=False"):
        inject(alone, BottleneckAdapter())
    inject(alone, BottleneckAdapter(after_ffn=False))


def test_layers_and_exclusions_narrow_the_choice() -> None:
    def hosts(**fields: Any) -> list[str]:
        model = tiny_models.llama()
        inject(model, BottleneckAdapter(reduction_factor=4, **fields))
        found = [path for path, _ in model.named_modules() if path.endswith("bottleneck")]
        return [path.partition(".peft.")[0].partition("layers.")[2] for path in found]

    assert hosts() == ["0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.down_proj"]
    assert hosts(layers=[-1]) == ["1.self_attn.o_proj", "1.mlp.down_proj"]
    assert hosts(layers=[0, -1], exclude_modules=["mlp"]) == ["0.self_attn.o_proj", "1.self_attn.o_proj"]
    assert hosts(exclude_modules=["attention"]) == ["0.mlp.down_proj", "1.mlp.down_proj"]  # a role
    assert hosts(exclude_modules="ffn-output", layers=[0]) == ["0.self_attn.o_proj"]
    for message, fields in {
        "layers: there is no layer 2": {"layers": [2]},
        "exclude_modules: 'mpl' matches nothing. Did you mean 'mlp'": {"exclude_modules": ["mpl"]},
        "exclude_modules and layers leave nothing": {"exclude_modules": ["layers"]},
    }.items():
        with pytest.raises(TargetError, match=message):
            hosts(**fields)


class Branches(nn.Module):
    """A module whose last layer is not the one that its output comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 8), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.narrow(x).mean()


class Returns(nn.Module):
    """A module that returns whatever it is told to make of its layer's output."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layer, self.make = nn.Conv1d(4, 4, 1), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.layer(x))


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (Branches(), (2, 6), r"on 'm' expected 4 features and met an output of shape \(2, 8\). Name another module"),
        (Returns(lambda y: y.flatten(1)), (2, 4, 5), r"expected 4 features and met an output of shape \(2, 20\)"),
        (Returns(lambda y: y.sum((1, 2))), (2, 4, 5), r"expected 4 features and met an output of shape \(2,\)"),
        (Returns(lambda y: {"y": y}), (2, 4, 5), "met an output of type dict, not a tensor"),
    ],
    ids=["branches", "flattened", "one number", "dictionary"],
)
def test_a_width_that_was_told_wrong_is_an_error_at_the_first_forward(module: Any, shape: Any, message: str) -> None:
    model = nn.ModuleDict({"m": module})
    inject(model, BottleneckAdapter(target_modules=["m"], width=2))
    with pytest.raises(TargetError, match=message):
        model["m"](torch.randn(shape))


def test_a_module_without_a_layer_that_tells_its_width_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

    model = nn.ModuleDict({"m": Scaled(), "up": nn.ConvTranspose2d(3, 4, 2)})
    before = Snapshot(model)
    for name in ("m", "up"):
        with pytest.raises(TargetError, match=rf"cannot tell how many features '{name}' .* puts out"):
            inject(model, BottleneckAdapter(target_modules=[name]))
    before.assert_same(model)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["conv3"], TargetError, r"target_modules: 'conv3' matches no module. Did you mean 'conv2'"),
        (["conv2", "convolution"], TargetError, "'convolution' matches no module"),
        ("conv[", TargetError, "neither the name of a layer nor a regular expression"),
        (["relu"], TargetError, "'relu' matches no module"),  # nothing in it tells a width
        (["stem"], ConfigError, "'stem' is a Sequential, which runs its children: target a layer inside it"),
        (["query"], TargetError, "'query' matches no module"),
    ],
    ids=str,
)
def test_names_that_match_nothing_or_a_container_are_refused(targets: Any, error: type, message: str) -> None:
    model = nn.ModuleDict(
        {"conv2": nn.Conv2d(3, 4, 1), "relu": nn.ReLU(), "stem": nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())}
    )
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, BottleneckAdapter(target_modules=targets))
    before.assert_same(model)


def test_what_is_trained_whole_gets_no_adapter() -> None:
    model = tiny_models.bert()
    with pytest.raises(TargetError, match=r"Nothing to adapt: .* modules_to_save leave no module"):
        inject(model, BottleneckAdapter(target_modules=["classifier"]))
    inject(model, BottleneckAdapter(modules_to_save=["layer.1"], reduction_factor=4))
    found = [path for path, _ in model.named_modules() if path.endswith("bottleneck")]
    assert [".layer.0." in path for path in found] == [True, True]
