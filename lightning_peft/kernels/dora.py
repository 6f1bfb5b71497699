r"""The rescaled low-rank update :math:`c \odot (y + s B A x) + (1 - c) \odot b` of a host's output y, b being its bias.

The magnitude m is scaled by a norm that is a constant to the backward, :math:`c = m / n`. Kept for the backward are x
(hosts that are called with the same x share it), A x, r numbers a row, and, where m trains, the host's output with the
update written into it: m's gradient needs it as it was before it was scaled. That is not read off the result, although
this would keep nothing new: a module behind the host may write into the result (``ReLU(inplace=True)``), and of a
magnitude of zero or a large bias nothing could be read off.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_peft.kernels.low_rank import add_, can_write, draw_seed, gradients, masked, plain_update, redrawn_mask
from lightning_peft.network.layouts import Layout


def plain_rescaled(
    layout: Layout,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    m: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """The rescaled update in a new tensor, by torch's own operations and so with all that they support.

    Args:
        layout: of the host's weight.
        x: the host's input (..., in).
        y: its output (..., out).
        a: (r, in).
        b: (out, r).
        m: magnitude (out,).
        norm: what m is divided by (out,); it gets no gradient.
        bias: the host's (out,), which is not scaled; None if it has none.
        scale: of the update.
        dropout: probability of dropping a feature of x on the way to A.
    """
    return rescaled(layout, plain_update(layout, x, y, a, b, scale, dropout), m / norm.detach(), bias)


def rescaled(layout: Layout, z: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """``c · z + (1 - c) · bias`` in the dtype of ``z``; c is not rounded to it, or small steps of m would be lost.

    Args:
        layout: of the host's weight.
        z: the host's output with the update in it (..., out).
        c: the factors (out,).
        bias: the host's (out,), which is not scaled; None if it has none.
    """
    out = z * layout.channels(c)
    if bias is not None:  # as a sum, which changes nothing where c is one, not as the difference of z and the bias
        out = out + layout.channels((1 - c) * bias)
    return out.to(z.dtype)


def rescaled_update(
    layout: Layout,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    m: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """:func:`plain_rescaled` of ``y``, the output of a matrix product that nothing else reads and that is overwritten.

    Where that cannot be done (see :func:`~lightning_peft.kernels.low_rank.update_`) this is :func:`plain_rescaled`.
    """
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, a, b, m))
    # With A frozen, x is not to be kept, and without it the other gradients could not be derived a second time.
    frozen = graph and not a.requires_grad and (b.requires_grad or m.requires_grad)
    trains_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if frozen or trains_bias or not can_write(x, y, a, b, dropout):
        return plain_rescaled(layout, x, y, a, b, m, norm, bias, scale, dropout)
    seed = draw_seed(dropout)
    if graph:
        updated: Tensor = _Rescaled.apply(x, y, a, b, m, norm, bias, scale, dropout, seed)
        return updated
    add_(x, y, a, b, scale, dropout, seed)
    return _rescale(y, m / norm, bias, out=y)


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        m: Tensor,
        norm: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        h = add_(x, y, a, b, scale, dropout, seed)  # through y, as in lightning_peft.kernels.low_rank
        _, _, needs_a, needs_b, needs_m = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x if needs_a else None,
            y if needs_m else None,  # as it is now, with the update in it
            a,
            b,
            m,
            norm,
            bias if needs_m else None,
            h if needs_b else None,
        )
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.scale, ctx.dropout, ctx.seed = scale / (1 - dropout), dropout, seed
        return _rescale(y, m / norm, bias, out=None if needs_m else y.data)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, a, b, m, norm, bias, h = ctx.saved_tensors
        needs_x, needs_y, needs_a, needs_b, needs_m = ctx.needs_input_grad[:5]
        mask = redrawn_mask(ctx.shape, grad, ctx.dropout, ctx.seed) if needs_x or needs_a else None
        dy, dm = grad.flatten(0, -2) if grad.dim() > 1 else grad[None], None
        memory: Tensor | None = None
        if needs_m:
            z = z.view(dy.shape)
            if torch.is_grad_enabled():  # of z, its host's part alone is an input: a second derivative needs the rest
                update = _update(x, a, b, mask, ctx.scale, dy)
                z = z + (update - update.detach())
            # The products of fp16, whose gradients are scaled up, may leave its range.
            products = (dy.float() if dy.dtype == torch.float16 else dy) * z
            dm = products.sum(0, dtype=norm.dtype)
            if bias is not None:
                dm = dm - bias * dy.sum(0, dtype=norm.dtype)
            dm = dm / norm
            memory = products if products.dtype == dy.dtype and not torch.is_grad_enabled() else None
        c = m / norm
        dz = (dy * c).to(dy.dtype) if memory is None else torch.mul(dy, c, out=memory)
        dx, da, db = gradients(dz, x, a, b, h, mask, ctx.scale, ctx.shape, ctx.dtype, (needs_x, needs_a, needs_b))
        return dx, dz.view(grad.shape) if needs_y else None, da, db, dm, None, None, None, None, None


def _update(x: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, scale: float, like: Tensor) -> Tensor:
    """The update by itself, (rows, out)."""
    kept = masked(x.reshape(len(like), -1).to(like.dtype), mask)
    return (kept @ a.to(like.dtype).T) @ (b.T * scale).to(like.dtype)


def _rescale(z: Tensor, c: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """As :func:`rescaled` in one pass, of channels in the last place, into ``out`` or a new tensor."""
    out = torch.empty_like(z) if out is None else out
    return torch.mul(z, c, out=out) if bias is None else torch.addcmul((1 - c) * bias, z, c, out=out)
