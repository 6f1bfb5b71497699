"""A bottleneck: two small linear layers and a non-linearity, with whatever may stand around them."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.components.gate import Gate
from lightning_peft.core.adapter import adapter_dtype

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "identity": lambda z: z,
}


class Bottleneck(nn.Module):
    """f: (..., d) -> (..., d)."""

    def __init__(self, method: Any, d: int, m: int, like: Tensor, batch_dim: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": like.device, "dtype": adapter_dtype(like)}
        self.down, self.up = nn.Linear(d, m, **options), nn.Linear(m, d, **options)
        self.nonlinearity, self.dropout, scale = method.choice("nonlinearity"), method.dropout, method.choice("scale")
        learned = {"learned": 1, "channel": d}.get(scale)
        self.scale = nn.Parameter(torch.ones(learned, **options)) if learned else scale
        self.norm_before = nn.LayerNorm(d, **options) if method.layer_norm == "before" else None
        self.norm_after = nn.LayerNorm(d, **options) if method.layer_norm == "after" else None
        self.gate = Gate(d, self.down.weight, batch_dim) if method.gating else None
        # After the gate: each draws from the same generator, and a seed must give what it gave before.
        _INITS[method.choice("init")](self.down, self.up)
        for bias in (self.down.bias, self.up.bias):
            nn.init.zeros_(bias)

    def forward(self, z: Tensor) -> Tensor:
        entered = z
        if self.norm_before is not None:
            z = _norm(self.norm_before, z)
        h = NONLINEARITIES[self.nonlinearity](_linear(self.down, z))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        # The scale goes into the small weights, not over an output that is as large as the stream.
        if self.norm_after is None:
            out = _linear(self.up, h, self.scale)
        else:
            out = _norm(self.norm_after, _linear(self.up, h), self.scale)
        return out if self.gate is None else out * self.gate(entered)


def _linear(layer: nn.Linear, x: Tensor, scale: Any = 1.0) -> Tensor:
    """``scale`` times the layer's output, which is as large as the stream: learned, it goes into the small weight."""
    weight: Tensor = layer.weight
    bias: Tensor = layer.bias
    if isinstance(scale, Tensor):
        weight, bias, scale = weight * scale[:, None], bias * scale, 1.0
    # The small factors follow the dtype of the large tensors, never the other way round.
    out = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
    return out if scale == 1 else out * scale


def _norm(layer: nn.LayerNorm, x: Tensor, scale: Any = 1.0) -> Tensor:
    weight, bias = ((p * scale).to(x.dtype) for p in (layer.weight, layer.bias))
    return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)


def _houlsby(down: nn.Linear, up: nn.Linear) -> None:
    for layer in (down, up):
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)


def _bert(down: nn.Linear, up: nn.Linear) -> None:
    for layer in (down, up):
        nn.init.normal_(layer.weight, std=0.02)


def _mam(down: nn.Linear, up: nn.Linear) -> None:
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)


_INITS: dict[str, Callable[[nn.Linear, nn.Linear], None]] = {"houlsby": _houlsby, "bert": _bert, "mam": _mam}
