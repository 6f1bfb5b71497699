"""Low-rank updates of one batch whose rows have different adapters."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.components.low_rank import LowRankOutput
from lightning_peft.core.adapter_index import AdapterIndex

_LONG = 16  # tokens of a sequence from which on gathered factors are faster than a mask on all ranks


class ByRow:
    """Adds to each row what its adapter makes of it.

    Factors are gathered for each row, (rows, r, in), where a row is long enough to make up for it. Else all adapters
    see all rows, and a mask on the ranks, (rows, sum of r), leaves each row its own.
    """

    def __init__(self, adapters: Sequence[LowRankOutput]) -> None:
        self.adapters = adapters
        self.ranks = [adapter.lora_A.shape[0] for adapter in adapters]
        self.scales = [adapter.scale for adapter in adapters]

    def __call__(self, x: Tensor, y: Tensor, index: AdapterIndex) -> Tensor:
        first = self.adapters[0]
        if first.dropout:
            x = F.dropout(x, first.dropout, first.training)
        return (self._gathered if x.dim() > 2 and x.shape[1:-1].numel() >= _LONG else self._masked)(x, y, index)

    def _gathered(self, x: Tensor, y: Tensor, index: AdapterIndex) -> Tensor:
        rows, scales, most = index.rows, self.scales, max(self.ranks)
        # Behind the last adapter stands one of zeros, for the rows that get none.
        a: list[Tensor] = [own.lora_A for own in self.adapters]
        b: list[Tensor] = [own.lora_B for own in self.adapters]
        if min(self.ranks) < most:
            a = [F.pad(factor, (0, 0, 0, most - factor.shape[0])) for factor in a]
            b = [F.pad(factor, (0, most - factor.shape[1])) for factor in b]
        a_rows = torch.stack([*a, torch.zeros_like(a[0])]).to(y.dtype).index_select(0, rows)  # (rows, r, in)
        b_rows = torch.stack([*b, torch.zeros_like(b[0])]).to(y.dtype).index_select(0, rows)  # (rows, out, r)
        scale = index.once(
            (*scales, y.dtype), lambda: y.new_tensor([*scales, 0.0]).index_select(0, rows)[:, None, None]
        )
        h = torch.bmm(x.flatten(1, -2), a_rows.mT) * scale
        flat = y.flatten(1, -2)
        # In place where nothing is recorded: y is the layer's own, fresh.
        add = flat.baddbmm if torch.is_grad_enabled() else flat.baddbmm_
        return add(h.to(y.dtype), b_rows.mT).view_as(y)

    def _masked(self, x: Tensor, y: Tensor, index: AdapterIndex) -> Tensor:
        ranks, scales, rows = self.ranks, self.scales, index.rows

        def mask() -> Tensor:
            owner = torch.tensor([i for i, r in enumerate(ranks) for _ in range(r)], device=rows.device)
            scale = torch.tensor([s for s, r in zip(scales, ranks, strict=True) for _ in range(r)], device=rows.device)
            return ((rows[:, None] == owner) * scale).to(y.dtype)  # (rows, sum of r)

        own_ranks = index.once((*ranks, *scales, y.dtype), mask).view(len(rows), *[1] * (x.dim() - 2), -1)
        h = F.linear(x, torch.cat([own.lora_A for own in self.adapters]).to(y.dtype)) * own_ranks
        b = torch.cat([own.lora_B for own in self.adapters], 1).to(y.dtype)
        flat = y.flatten(0, -2)
        add = flat.addmm if torch.is_grad_enabled() else flat.addmm_
        return add(h.to(y.dtype).flatten(0, -2), b.T).view_as(y)
