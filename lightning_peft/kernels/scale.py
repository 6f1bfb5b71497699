r"""The rescaling :math:`l \odot y`, written into y. Its backward keeps the result, as what follows often does too.

With :math:`o = l \odot y` and its gradient g, the gradient of l is :math:`\sum g \odot y = \frac1l \sum g \odot o`. Of
a factor 0 the result would not tell y any more, so something is added to all: beside 1 far less than a rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.kernels.low_rank import are_plain, is_recorded

_LEAST = {torch.bfloat16: 2.0**-46, torch.float32: 2.0**-46, torch.float64: 2.0**-104}  # fp16 has none so small


def plain_scale(y: Tensor, scale: Tensor) -> Tensor:
    """``y * scale`` in a new tensor, by torch's own operations and so with all that they support.

    Args:
        y: (..., features).
        scale: (features,), or fewer: the features before them stay as they are.
    """
    scale, start = scale.to(y.dtype), y.shape[-1] - scale.shape[0]
    return y * (F.pad(scale, (start, 0), value=1.0) if start else scale)


def scale_(y: Tensor, scale: Tensor) -> Tensor:
    """:func:`plain_scale` into the memory of ``y``, which nothing else reads and nothing may write into from now on.

    Where that cannot be done (in a graph that torch compiles or exports, under its function transforms, where the
    operations are being recorded, or in fp16, whose range is too small) this is :func:`plain_scale`.
    """
    graph = torch.is_grad_enabled() and (y.requires_grad or scale.requires_grad)
    frozen = graph and not scale.requires_grad  # torch keeps nothing of y then
    if frozen or is_recorded() or not _fits(y, scale):
        return plain_scale(y, scale)
    if graph:
        scaled: Tensor = _Scale.apply(y, scale)
        return scaled
    _end(y, scale).mul_(scale)
    return y


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor) -> Tensor:
        _end(y, scale).mul_(_invertible(scale, y))
        out = y.data  # an alias, as in lightning_peft.kernels.low_rank
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        out, scale = ctx.saved_tensors
        factors = _invertible(scale, out)
        products = _end(grad, scale) * _end(out, scale)
        total = products.sum(tuple(range(out.dim() - 1)), dtype=scale.dtype) if out.dim() > 1 else products
        return plain_scale(grad, factors) if ctx.needs_input_grad[0] else None, total / factors


def _invertible(scale: Tensor, y: Tensor) -> Tensor:
    return scale.to(y.dtype) + _LEAST[y.dtype]


def _end(y: Tensor, scale: Tensor) -> Tensor:
    """The last features of ``y``, as many as ``scale`` has factors."""
    n = scale.shape[0]
    return y if y.shape[-1] == n else y[..., -n:]


def _fits(y: Tensor, scale: Tensor) -> bool:
    return are_plain(y, scale) and y.dtype in _LEAST and not y.is_meta and y.numel() > 0
