"""Networks with quantized layers: by packages where they are installed, and by twenty lines of plain torch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.network.quantized.weights import Quantized, reads

OWN, PACKAGES = "own", ["nf4", "nf4 double", "fp4", "llm.int8", "torchao int8", "torchao int4"]


class Nibbles(nn.Parameter):
    """Two numbers from -7 to 7 in a byte."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # torch would make it a plain parameter
        return Nibbles, (self.data, False)


class NibbleLinear(nn.Linear):
    """A linear layer of four bits a weight, and one step for each row."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.register_buffer("step", plain.weight.detach().abs().amax(1, keepdim=True) / 7)
        high, low = (plain.weight.detach() / self.step).round().to(torch.int8).add(7).to(torch.uint8).view(-1, 2).T
        self.weight, self.bias = Nibbles(high * 16 + low, requires_grad=False), plain.bias
        self.bits = 4

    def values(self) -> Tensor:
        numbers = torch.stack([self.weight // 16, self.weight % 16], 1).view(self.out_features, self.in_features)
        return (numbers.float() - 7) * self.step

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.values().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


@reads(f"{Nibbles.__module__}.{Nibbles.__qualname__}")
def _nibbles(module: Any, name: str, weight: Any) -> Quantized:
    return Quantized(
        scheme="nibbles",
        shape=torch.Size((module.out_features, module.in_features)),
        dequantize=module.values,
        error=lambda: 0.51 * module.step,
        beside=frozenset(("step",)),
        attributes=("bits",),
    )


def quantize(network: nn.Module, scheme: str) -> nn.Module:
    """A copy of ``network`` whose linear layers are quantized, all but the last; skips where the package is missing."""
    network = copy.deepcopy(network)
    names = [name for name, module in network.named_modules() if type(module) is nn.Linear][:-1]
    if scheme.startswith("torchao"):
        return _by_torchao(network, names, scheme.endswith("int4"))
    layer = NibbleLinear if scheme == OWN else _bitsandbytes_layer(scheme)
    for name in names:
        network.set_submodule(name, layer(network.get_submodule(name)))
    return network.to("cpu")  # where bitsandbytes quantizes


def _by_torchao(network: nn.Module, names: list[str], four_bits: bool) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    groups = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16))
    config = groups if four_bits else torchao.Int8WeightOnlyConfig()
    torchao.quantize_(network, config, filter_fn=lambda _, name: name in names)
    return network


def _bitsandbytes_layer(scheme: str) -> Callable[[nn.Linear], nn.Module]:
    layers = pytest.importorskip("bitsandbytes").nn

    def make(plain: nn.Linear) -> nn.Module:
        sizes: Any = plain.in_features, plain.out_features
        if scheme == "llm.int8":
            layer = layers.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            kind, double = scheme.split()[0], scheme.endswith("double")
            layer = layers.Linear4bit(*sizes, quant_type=kind, compress_statistics=double)
        layer.load_state_dict(plain.state_dict())
        return layer

    return make
