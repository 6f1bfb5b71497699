"""MAM and UniPELT against their papers: one block of BERT, in plain torch."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from perturbation import adapted
from torch import Tensor, nn

from lightning_peft import BottleneckAdapter, Combine, LoRA, PrefixTuning, inject
from lightning_peft.core.method import Method
from lightning_peft.errors import NotApplicableError

D, HEADS, LAYER = tiny_models.WIDTH, 2, "bert.encoder.layer.1"


def small(method: Any) -> Any:
    """A preset with sizes for layers 16 wide."""
    sizes = {"num_virtual_tokens": 3, "encoder_hidden_size": 7, "r": 2, "reduction_factor": 4}
    parts = [replace(m, **{k: v for k, v in sizes.items() if k in m.field_names()}) for m in method.methods]
    return replace(method, methods=parts, modules_to_save=None)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(d)) v for each head, heads side by side again."""
    q, k, v = (x.unflatten(-1, (HEADS, D // HEADS)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(D // HEADS)).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def slots(module: Any) -> Any:
    return module.peft.get_submodule


def test_mam_is_a_prefix_from_an_mlp_and_a_parallel_adapter() -> None:
    model = tiny_models.bert()
    base: Any = copy.deepcopy(model).eval().get_submodule(LAYER)
    adapted(model, small(Combine(preset="mam")))
    layer: Any = model.get_submodule(LAYER)
    x = torch.randn(2, 5, D)

    trunk = model.bert.encoder.layer[0].attention.self.peft.get_submodule("default:0_mlp")
    up = slots(layer.attention.self)("default:0").prefix.up
    assert trunk.embedding.shape == (3, D)
    hidden = torch.tanh(trunk.embedding @ trunk.down.weight.T + trunk.down.bias)  # (P, 7)
    keys, values = (hidden @ up.weight.T + up.bias).split(D, -1)
    own = base.attention.self
    k = torch.cat([keys.expand(2, -1, -1), own.key(x)], 1)
    v = torch.cat([values.expand(2, -1, -1), own.value(x)], 1)
    out = base.attention.output
    x1 = out.LayerNorm(out.dense(attention(own.query(x), k, v)) + x)
    f = slots(layer.output.dense)("default:1").bottleneck
    h = base.output.dense(base.intermediate(x1))
    added = 4 * (F.relu(x1 @ f.down.weight.T + f.down.bias) @ f.up.weight.T + f.up.bias)
    expected = base.output.LayerNorm(h + added + x1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert (layer(x) - base(x)).abs().max() > 0.1


def test_unipelt_gates_lora_prefix_and_adapter_by_their_own_inputs() -> None:
    model = tiny_models.bert()
    base: Any = copy.deepcopy(model).eval().get_submodule(LAYER)
    adapted(model, small(Combine(preset="unipelt")))
    layer: Any = model.get_submodule(LAYER)
    x = torch.randn(2, 5, D)

    def gate(g: Any, z: Tensor) -> Tensor:
        return torch.sigmoid((z * g.weight).sum(-1, keepdim=True) + g.bias).mean(1, keepdim=True)

    def linear(plain: nn.Module, tuned: nn.Module, z: Tensor) -> Tensor:
        a = slots(tuned)("default:0")
        return plain(z) + gate(a.gate, z) * 16 / 2 * z @ a.lora_A.T @ a.lora_B.T

    own, now = base.attention.self, layer.attention.self
    q, k, v = (linear(getattr(own, n), getattr(now, n), x) for n in ("query", "key", "value"))
    prefix, g = slots(now)("default:1").prefix, gate(slots(now)("default:1_gate").gate, x)
    k = torch.cat([g * prefix.keys, k], 1)
    v = torch.cat([g * prefix.values, v], 1)
    out = base.attention.output
    x1 = out.LayerNorm(linear(out.dense, layer.attention.output.dense, attention(q, k, v)) + x)
    b = slots(layer.output.LayerNorm)("default:2").bottleneck
    h, ln = base.output.dense(base.intermediate(x1)), base.output.LayerNorm
    z = ln(h + x1)
    f = F.relu(z @ b.down.weight.T + b.down.bias) @ b.up.weight.T + b.up.bias
    torch.testing.assert_close(layer(x), ln(h + gate(b.gate, z) * f + x1), rtol=1e-5, atol=1e-5)
    assert (layer(x) - base(x)).abs().max() > 0.1


def test_the_presets_are_those_of_the_papers() -> None:
    mam, unipelt = Combine(preset="mam"), Combine(preset="unipelt")
    assert mam.methods == [
        PrefixTuning(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=512),
        BottleneckAdapter(preset="parallel"),
    ]
    assert unipelt.methods == [
        LoRA(r=8, target_modules=["attention"], gating=True),
        PrefixTuning(num_virtual_tokens=10, gating=True),
        BottleneckAdapter(preset="pfeiffer", gating=True),
    ]
    assert Combine() == mam
    assert not mam.starts_as_base
    assert mam.preset is unipelt.preset is None  # a file keeps the methods, whatever the preset becomes
    for method in (mam, unipelt):
        assert Method.from_config(method.to_config()).to_config() == method.to_config()


@pytest.mark.parametrize("preset", ["mam", "unipelt"])
@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.llama, tiny_models.t5, tiny_models.vit])
def test_every_part_of_a_preset_gets_a_gradient_in_every_layer(preset: str, build: Any) -> None:
    model = adapted(build(), small(Combine(preset=preset)))
    if build is tiny_models.vit:
        loss = model(torch.randn(2, 3, 8, 8)).logits.square().sum()
    else:
        ids = torch.arange(1, 11).view(2, 5)
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in own.items() if p.grad is None or not p.grad.any()]
    for i in range(len(small(Combine(preset=preset)).methods)):
        assert len([name for name in own if f"default:{i}" in name]) >= 4


@pytest.mark.parametrize("preset", ["mam", "unipelt"])
def test_the_rows_of_a_batch_stay_apart(preset: str) -> None:
    model = adapted(tiny_models.bert(), small(Combine(preset=preset)))
    ids = torch.arange(1, 13).view(3, 4)
    torch.testing.assert_close(model(input_ids=ids).logits[1:2], model(input_ids=ids[1:2]).logits, rtol=1e-4, atol=1e-5)


def test_unipelt_needs_linear_layers_to_gate() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12)
    with pytest.raises(NotApplicableError, match=r"LoRA\.gating cannot act on 'self_attn\.in_proj'"):
        inject(layer, Combine(preset="unipelt"))
    assert not any("peft" in name for name, _ in layer.named_modules())
