r"""The low-rank update :math:`y + s B A x`, written into y: nothing else of y's size is made, in the backward neither.

Kept for the backward are x itself (hosts that are called with the same x share it), and A x, r numbers a row. Of
dropout, the seed of its mask is kept. A and B follow the dtype of x and y, which are never cast up; torch's matrix
products add up in fp32, and the gradients of A and B have the dtype of A and B.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from lightning_peft.network.layouts import Layout


def plain_update(layout: Layout, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Any, dropout: float) -> Tensor:
    """``y + scale · B A dropout(x)`` in a new tensor, by torch's own operations and so with all that they support.

    Args:
        layout: of the host's weight.
        x: the host's input (..., in).
        y: its output (..., out).
        a: (r, in).
        b: (out, r).
        scale: a number, or a tensor that can be multiplied with (..., r).
        dropout: probability of dropping a feature of x.
    """
    if dropout:
        x = F.dropout(x, dropout)
    # The small factors follow the dtype of the large tensors, never the other way round.
    h = layout.down(x, a.to(y.dtype))  # (..., r)
    return y + layout.up(h * scale, b.to(y.dtype))


def update_(layout: Layout, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
    """:func:`plain_update` into the memory of ``y``, the output of a matrix product that nothing else reads.

    Where that cannot be done (in a graph that torch compiles or exports, under its function transforms, where the
    operations are being recorded) this is :func:`plain_update`.
    """
    graph = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or a.requires_grad or b.requires_grad)
    # With A frozen, x is not to be kept, and without it the gradient of B could not be derived a second time.
    frozen = graph and b.requires_grad and not a.requires_grad
    if frozen or not can_write(x, y, a, b, dropout):
        return plain_update(layout, x, y, a, b, scale, dropout)
    seed = draw_seed(dropout)
    if graph:
        updated: Tensor = _Update.apply(x, y, a, b, scale, dropout, seed)
        return updated
    add_(x, y, a, b, scale, dropout, seed)
    return y


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float, seed: int
    ) -> Tensor:
        # Written through y, so that a backward that did keep y notices; returned through an alias: an output that is
        # an input would have to be marked dirty, and of a view (what a linear layer with a bias returns) torch would
        # then compute the gradient through a copy.
        h = add_(x, y, a, b, scale, dropout, seed)
        _, _, needs_a, needs_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(x if needs_a else None, a, b, h if needs_b else None)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.scale, ctx.dropout, ctx.seed = scale / (1 - dropout), dropout, seed
        return y.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h = ctx.saved_tensors
        needs_x, needs_y, needs_a, needs_b = ctx.needs_input_grad[:4]
        mask = redrawn_mask(ctx.shape, grad, ctx.dropout, ctx.seed) if needs_x or needs_a else None
        dx, da, db = gradients(grad, x, a, b, h, mask, ctx.scale, ctx.shape, ctx.dtype, (needs_x, needs_a, needs_b))
        return dx, grad if needs_y else None, da, db, None, None, None


def gradients(
    grad: Tensor,
    x: Tensor | None,
    a: Tensor,
    b: Tensor,
    h: Tensor | None,
    mask: Tensor | None,
    scale: float,
    shape: torch.Size,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The needed gradients of x, A and B through the update, from the gradient of its output.

    Args:
        grad: the gradient of the output, (..., out).
        x: the update's input (..., in), where A needs a gradient.
        a: (r, in).
        b: (out, r).
        h: A x of the features that were kept, (rows, r), where B needs a gradient.
        mask: which features were kept, (rows, in); None for all.
        scale: all that scales the update.
        shape: of x.
        dtype: of x.
        needs: whether x, A and B need one.
    """
    rows, width = math.prod(shape[:-1]), shape[-1]
    dy = grad.reshape(rows, -1)
    g = F.linear(dy, _up(b, scale, dy.dtype))  # (rows, r)
    dx = da = db = None
    if needs[0]:
        dx = g @ a.to(dy.dtype)
        if mask is not None:
            dx = dx * mask if torch.is_grad_enabled() else dx.mul_(mask)
        dx = dx.to(dtype).view(shape)
    if needs[1]:
        assert x is not None
        kept = masked(x.reshape(rows, width).to(dy.dtype), mask)
        da = (g.T @ kept).to(a.dtype)
        if torch.is_grad_enabled():  # of what was kept, A x alone is no input: a second derivative needs it anew
            h = F.linear(kept, a.to(dy.dtype))
    if needs[2]:
        assert h is not None
        db = (h.T @ dy).to(b.dtype).T * scale
    return dx, da, db


def add_(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float, seed: int) -> Tensor:
    """Write the update into ``y``; returns A x of the features that are not dropped: (rows, r)."""
    rows = y.numel() // y.shape[-1]
    kept = x.reshape(rows, -1).to(y.dtype)  # as autocast does for the host
    kept = masked(kept, redrawn_mask(kept.shape, y, dropout, seed))
    h = F.linear(kept, a.to(y.dtype))
    y.view(rows, -1).addmm_(h, _up(b, scale / (1 - dropout), y.dtype))
    return h


def draw_seed(dropout: float) -> int:
    """A seed for the mask of dropout; 0 where there is none.

    From torch's stream of random numbers, which gradient checkpointing winds back before it computes again.
    """
    return int(torch.randint(2**62, (), device="cpu")) if dropout else 0


def redrawn_mask(shape: torch.Size, like: Tensor, dropout: float, seed: int) -> Tensor | None:
    """Which features of x (..., in) dropout keeps, as (rows, in), the same for the same seed; None without dropout."""
    if not dropout:
        return None
    generator = torch.Generator(like.device).manual_seed(seed)
    size = math.prod(shape[:-1]), shape[-1]
    if not like.is_cpu:
        return torch.empty(size, dtype=torch.bool, device=like.device).bernoulli_(1 - dropout, generator=generator)
    # On a CPU a draw costs more than all else here, and one of 64 bits does for four features. The probability is then
    # a multiple of 2**-16.
    count = math.prod(size)
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    dropped = min(round(dropout * 2**16), 2**16 - 1)
    return (draws.view(torch.int16)[:count] >= dropped - 2**15).view(size)


def can_write(x: Tensor, y: Tensor, a: Tensor, b: Tensor, dropout: float) -> bool:
    """True if an update can be written into ``y``: its dtype and kind fit, and torch is not recording operations."""
    return not is_recorded() and _fits(x, y, a, b, dropout)


def _up(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``B`` with all that scales the update, as (r, out): in this layout both products with it are fast on CPUs."""
    return (b.T * scale).to(dtype).contiguous()


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """The features of ``x`` (rows, in) that ``mask`` of the same shape keeps; all without a mask."""
    return x if mask is None else x * mask


def is_recorded() -> bool:
    """True if torch records operations, or runs them otherwise than one after the other on plain numbers."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def are_plain(*tensors: Tensor) -> bool:
    """True if all are of torch's own classes: a class of another's may give an operation another meaning."""
    return all(type(tensor) in (Tensor, Parameter) for tensor in tensors)


def _fits(x: Tensor, y: Tensor, a: Tensor, b: Tensor, dropout: float) -> bool:
    if not are_plain(x, y, a, b) or y.is_meta or not y.numel() or not y.is_contiguous():
        return False
    if dropout and y.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # a replay would drop the same features again
    device = y.device.type
    return y.dtype == (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
