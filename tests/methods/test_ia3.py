"""IA3: which layers it finds, what it does to them, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from snapshot import Snapshot
from torch import nn

from lightning_peft import IA3, inject, merge
from lightning_peft.errors import ConfigError, NotApplicableError, PEFTError, TargetError
from lightning_peft.injection.slots import named_slots
from lightning_peft.methods.ia3 import IA3Input, IA3Output, IA3Weight

Build = Callable[..., nn.Module]
IDS = torch.tensor([[9, 7, 12, 33, 21, 8], [8, 7, 5, 11, 3, 4]])


def _phi3() -> nn.Module:
    """Queries, keys and values in one layer, with fewer keys and values."""
    config = hf.Phi3Config(**{**tiny_models.SIZES, **tiny_models.TOKENS}, num_key_value_heads=1)
    return hf.Phi3ForCausalLM(config)


def _neox() -> nn.Module:
    """Queries, keys and values in one layer, head by head."""
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**tiny_models.SIZES, **tiny_models.TOKENS))


def _adapters(model: nn.Module) -> dict[str, Any]:
    return {path: adapter for path, _, slots in named_slots(model) for adapter in slots.children()}


def _random(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("ia3_l"):
                parameter.uniform_(0.5, 1.5)


BERT = "bert.encoder.layer"
FOUND: dict[Build, dict[str, tuple[type, int]]] = {
    # of the first layer: what is rescaled, and how many features of it
    tiny_models.bert: {
        f"{BERT}.0.attention.self.key": (IA3Output, 16),
        f"{BERT}.0.attention.self.value": (IA3Output, 16),
        f"{BERT}.0.output.dense": (IA3Input, 24),
    },
    tiny_models.gpt2: {
        "transformer.h.0.attn.c_attn": (IA3Output, 32),
        "transformer.h.0.mlp.c_proj": (IA3Input, 64),
    },
    tiny_models.llama: {
        "model.layers.0.self_attn.k_proj": (IA3Output, 8),
        "model.layers.0.self_attn.v_proj": (IA3Output, 8),
        "model.layers.0.mlp.down_proj": (IA3Input, 24),
    },
    _phi3: {
        "model.layers.0.self_attn.qkv_proj": (IA3Output, 16),
        "model.layers.0.mlp.down_proj": (IA3Input, 24),
    },
    lambda: nn.ModuleDict({"a": nn.MultiheadAttention(12, 2)}): {"a": (IA3Weight, 24)},
    tiny_models.vit: {
        "vit.layers.0.attention.k_proj": (IA3Output, 16),
        "vit.layers.0.attention.v_proj": (IA3Output, 16),
        "vit.layers.0.mlp.fc2": (IA3Input, 24),
    },
}


@pytest.mark.parametrize("build", FOUND)
def test_what_it_rescales_by_itself(build: Build) -> None:
    model = build()
    inject(model, IA3())
    adapters = {path: a for path, a in _adapters(model).items() if isinstance(a, IA3Output | IA3Input | IA3Weight)}
    found = {path: (type(adapter), adapter.ia3_l.numel()) for path, adapter in adapters.items() if ".1." not in path}
    assert found == FOUND[build]
    assert all(torch.equal(adapter.ia3_l, torch.ones_like(adapter.ia3_l)) for adapter in adapters.values())


def test_every_attention_of_an_encoder_decoder_model() -> None:
    model = tiny_models.t5()
    inject(model, IA3(layers=[0]))
    assert list(_adapters(model)) == [
        *(f"encoder.block.0.layer.0.SelfAttention.{name}" for name in "kv"),
        "encoder.block.0.layer.1.DenseReluDense.wo",
        *(f"decoder.block.0.layer.0.SelfAttention.{name}" for name in "kv"),
        *(f"decoder.block.0.layer.1.EncDecAttention.{name}" for name in "kv"),
        "decoder.block.0.layer.2.DenseReluDense.wo",
    ]


@pytest.mark.parametrize("build", [tiny_models.gpt2, _phi3, tiny_models.llama])
def test_queries_stay_as_they_are(build: Build) -> None:
    model = build().eval()
    name = {tiny_models.gpt2: "c_attn", _phi3: "qkv_proj", tiny_models.llama: "k_proj"}[build]
    layer = next(module for path, module in model.named_modules() if path.endswith(name))
    x = torch.randn(3, tiny_models.WIDTH)
    plain = layer(x)
    inject(model, IA3())
    _random(model)
    scale = layer.peft.default.ia3_l
    spared = plain.shape[-1] - scale.numel()
    assert spared == (0 if build is tiny_models.llama else tiny_models.WIDTH)
    torch.testing.assert_close(layer(x)[:, :spared], plain[:, :spared], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x)[:, spared:], plain[:, spared:] * scale)


def test_where_heads_lie_side_by_side_the_layer_has_to_be_named() -> None:
    model = _neox()
    with pytest.raises(NotApplicableError, match="holds query, key and value head by head"):
        inject(model, IA3())
    inject(model, IA3(target_modules=["query_key_value", "ffn-output"], feedforward_modules=["ffn-output"]))
    assert model.gpt_neox.layers[0].attention.query_key_value.peft.default.ia3_l.numel() == 3 * tiny_models.WIDTH


def test_attention_with_rescaled_keys_and_values_in_torchs_layer() -> None:
    layer = nn.MultiheadAttention(12, 2, batch_first=True).eval()
    nn.init.normal_(layer.in_proj_bias)
    x = torch.randn(2, 5, 12)
    q, k, v = nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    inject(layer, IA3())
    _random(layer)
    scale_k, scale_v = next(iter(_adapters(layer).values())).ia3_l.chunk(2)
    heads = [y.unflatten(-1, (2, 6)).transpose(1, 2) for y in (q, k * scale_k, v * scale_v)]
    expected = layer.out_proj(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, x, x)[0], expected)
    torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], expected)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 7), (2, 5, 6)),
    "conv1d": (nn.Conv1d(6, 8, 3), (2, 6, 9)),
    "conv2d": (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 7, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("feedforward", [False, True])
def test_layers_that_are_named(name: str, feedforward: bool) -> None:
    plain, shape = LAYERS[name]
    model = nn.ModuleDict({"layer": copy.deepcopy(plain)}).eval()
    x = torch.randn(shape)
    inject(model, IA3(target_modules=["layer"], feedforward_modules=["layer"] if feedforward else None))
    _random(model)
    scale = model.layer.peft.default.ia3_l
    scale = scale if name == "linear" else scale.view(-1, *[1] * (len(shape) - 2))
    expected = plain(x * scale) if feedforward else plain(x) * scale
    torch.testing.assert_close(model.layer(x), expected)
    merge(model)
    torch.testing.assert_close(model.layer(x), expected, rtol=1e-5, atol=1e-5)


def test_of_named_targets_only_the_named_feedforward_layers_are_rescaled_before() -> None:
    kinds = {}
    for feedforward in (None, ["down_proj"], "model.layers.0.mlp.down_proj", ["ffn-output"]):
        model = tiny_models.llama()
        inject(model, IA3(target_modules=["q_proj", "down_proj"], feedforward_modules=feedforward))
        kinds[str(feedforward)] = [type(adapter).__name__ for adapter in _adapters(model).values()]
    out, before = "IA3Output", "IA3Input"
    assert kinds == {
        "None": [out, out, out, out],
        "['down_proj']": [out, before, out, before],
        "model.layers.0.mlp.down_proj": [out, before, out, out],
        "['ffn-output']": [out, before, out, before],
    }


@pytest.mark.parametrize(
    ("build", "fields", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, NotApplicableError, "no attention in Sequential.*target_modules="),
        (tiny_models.gpt2, {"layers": [9]}, TargetError, "9"),
        (tiny_models.gpt2, {"exclude_modules": ["nowhere"]}, TargetError, "exclude_modules.*'nowhere'"),
        (tiny_models.gpt2, {"exclude_modules": ["h"]}, TargetError, "exclude_modules=.* leave no layer"),
        (tiny_models.gpt2, {"target_modules": ["nothing"]}, TargetError, "target_modules: 'nothing'"),
        (tiny_models.gpt2, {"feedforward_modules": ["nothing"]}, TargetError, "^feedforward_modules: 'nothing'"),
        (
            tiny_models.llama,
            {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj", "o_proj"]},
            TargetError,
            "leave 4 layers, none of them one of feedforward_modules='o_proj': name it in target_modules",
        ),
        (
            tiny_models.gpt2,
            {"target_modules": ["wte"], "feedforward_modules": ["wte"]},
            NotApplicableError,
            "input of 'transformer.wte': Embedding has none",
        ),
        (
            lambda: nn.MultiheadAttention(12, 2),
            {"target_modules": ["in_proj"], "feedforward_modules": ["in_proj"]},
            NotApplicableError,
            "input of 'in_proj': MultiheadAttention has none",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_left_alone(
    build: Build, fields: Any, error: type[PEFTError], message: str
) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, IA3(**fields))
    before.assert_same(model)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"])
@pytest.mark.parametrize("value", [3, 1.5, True, "", [""], [1], ["a", None], {"a": 1}, b"x", object()])
def test_a_field_with_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"IA3\.{name} must be a non-empty string or a list of them, not "):
        IA3(**{name: value})


@pytest.mark.parametrize("value", [3, [], ["a"], [1.0], [True], "1"])
def test_layers_with_a_bad_value_are_named(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"IA3\.layers must be a list of layer indices"):
        IA3(layers=value)
