"""Sequences that begin with padding: virtual tokens go between padding and text.

In front of the padding it would stand apart from the text, and the padding would use up places in an attention window.
"""

import torch
from torch import Tensor


def left_padding(mask: Tensor | None) -> Tensor | None:
    """How many tokens of padding each row of ``mask`` (..., tokens) begins with, (..., 1); None where no row does."""
    # A graph cannot branch on the values of a mask: compiled, all rows are treated alike.
    if mask is None or not (torch.compiler.is_compiling() or bool((mask[..., :1] == 0).any())):
        return None
    return (mask.cumsum(-1) == 0).sum(-1, keepdim=True)


def insert(x: Tensor, part: Tensor, padding: Tensor | None, dim: int = -1) -> Tensor:
    """``x`` with ``part`` before the text of each row: in front of all, or behind the row's ``padding``.

    Args:
        x: (..., tokens), or (..., tokens, features) with ``dim=-2``.
        part: the same with other tokens.
        padding: from :func:`left_padding`.
        dim: the dimension of the tokens.
    """
    x = torch.cat([part, x], dim)
    lead = x.dim() + dim
    if padding is None or lead == 0:  # one row for all has no padding of its own
        return x
    if lead < padding.dim() - 1:  # positions, where a model makes one batch of several choices
        padding = padding.flatten(0, -2)
    size = part.shape[dim]
    columns = torch.arange(x.shape[dim], device=x.device)
    source = torch.where(columns < padding + size, columns - padding, columns)
    source = torch.where(columns < padding, columns + size, source)
    x, source = torch.broadcast_tensors(x, source if dim == -1 else source[..., None])
    return x.gather(dim, source)


def overwrite(x: Tensor, part: Tensor, start: int, padding: Tensor | None) -> Tensor:
    """``x`` (..., tokens, features) with ``part`` in the places from ``start`` on, behind the row's ``padding``."""
    size = part.shape[-2]
    if padding is None:
        return torch.cat([x[..., :start, :], part, x[..., start + size :, :]], -2)
    columns = torch.arange(x.shape[-2], device=x.device) - start - padding.view(*x.shape[:-2], 1)
    return x.masked_scatter(((columns >= 0) & (columns < size))[..., None], part)


def extract(x: Tensor, dim: int, length: int, padding: Tensor | None = None) -> Tensor:
    """The ``length`` tokens of ``x`` that were not inserted: the last ones, and the row's ``padding``.

    Args:
        x: of a batch, whose leading dimensions may have been made one.
        dim: the dimension to cut, counted from the last one.
        length: how many tokens remain.
        padding: from :func:`left_padding`.

    Returns:
        A contiguous tensor, as what models put out, which callers may ``view`` in another shape.
    """
    last = x.narrow(dim, x.shape[dim] - length, length)
    if padding is not None and length < x.shape[dim]:
        flat = x.shape[: padding.dim() - 1] != padding.shape[:-1]
        lead = (padding.numel(),) if flat else padding.shape[:-1]
        rows = padding.view(*lead, *[1] * (x.dim() - len(lead)))
        columns = torch.arange(length, device=x.device).view(-1, *[1] * (-dim - 1))
        last = torch.where(columns < rows, x.narrow(dim, 0, length), last)
    return last.contiguous()
