r"""How changes that several adapters make become one: the mathematics of :func:`~lightning_peft.combine`.

=============== ===================================================================== ==========================
recipe          what is made of changes d_1, d_2, ... with weights w_1, w_2, ...       paper
=============== ===================================================================== ==========================
linear          the sum of w_i d_i                                                     Ilharco et al., 2212.04089
magnitude_prune the same of the share "density" of each d_i that is largest            \
ties            of these, where they have the sign of their sum: the mean of w_i d_i   Yadav et al., 2306.01708
dare_linear     as linear, of entries kept at random, divided by their share           Yu et al., 2311.03099
dare_ties       as ties, of these                                                      \
=============== ===================================================================== ==========================

A low-rank change, s B A, is mixed factor by factor, each with the root of its weight (peft's formulas: cheap, and the
products of different adapters' factors come along); or as a whole: "cat" puts the factors side by side, and "svd" takes
the change of a given rank that is nearest to that sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.errors import ConfigError, NotApplicableError

SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Recipes that keep a share of the entries."""
WHOLE = ("cat", "svd")
"""Recipes for low-rank changes as a whole; of anything else they make what "linear" makes."""
RECIPES = ("linear", *WHOLE, *SPARSE)


@dataclass(frozen=True)
class LowRank:
    """The change ``scale * b @ a`` of a matrix."""

    a: Tensor
    """(r, in)."""
    b: Tensor
    """(out, r)."""
    scale: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to combine, with one weight for each adapter."""

    name: str
    weights: tuple[float, ...]
    density: float = 1.0
    rank: int | None = None
    generator: torch.Generator | None = None

    def mix(self, changes: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
        """Combine changes of one shape, entry by entry; ``weights`` take the place of the recipe's own."""
        own = changes[0].new_tensor(self.weights if weights is None else weights)
        w = own.view(-1, *[1] * changes[0].dim())
        if self.name.startswith("dare"):
            changes = [self._dropped(change) for change in changes]
        elif self.name in SPARSE:
            changes = [_largest(change, self.density) for change in changes]
        stacked = torch.stack(list(changes))
        if not self.name.endswith("ties"):
            return (stacked * w).sum(0)
        # The sign is voted on before weights: a negated adapter still says where it would have gone.
        elected = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
        return (stacked * w * elected).sum(0) / elected.sum(0).clamp(min=1)

    def mix_low_rank(self, changes: Sequence[LowRank]) -> LowRank:
        """Combine changes of one matrix.

        Raises:
            ConfigError: the rank asked for is larger than the sum's.
            NotApplicableError: the ranks differ, and the recipe mixes factor by factor.
        """
        scaled = [weight * change.scale for change, weight in zip(changes, self.weights, strict=True)]
        ranks = [len(change.a) for change in changes]
        if self.name in WHOLE:
            a = torch.cat([change.a * weight for change, weight in zip(changes, scaled, strict=True)])
            whole = LowRank(a, torch.cat([change.b for change in changes], 1), 1.0)
            if self.name == "svd":
                return _nearest(whole, self.rank or max(ranks))
            full = min(a.shape[1], len(whole.b))  # no change has a higher rank: nothing is lost by keeping to it
            return whole if sum(ranks) <= full else _nearest(whole, full)
        if len(set(ranks)) > 1:
            raise NotApplicableError(
                f"the ranks are {', '.join(map(str, ranks))}, and {self.name!r} mixes the factors entry by entry. Use "
                "method='svd' or 'cat', which take any ranks."
            )
        roots = [abs(weight) ** 0.5 for weight in scaled]
        signed = [root if weight >= 0 else -root for root, weight in zip(roots, scaled, strict=True)]  # on one side
        a = self.mix([change.a for change in changes], signed)
        return LowRank(a, self.mix([change.b for change in changes], roots), 1.0)

    def _dropped(self, change: Tensor) -> Tensor:
        if self.density == 1:
            return change
        # Drawn on the CPU, so that a seed means the same on every device.
        kept = torch.bernoulli(torch.full(change.shape, self.density, dtype=change.dtype), generator=self.generator)
        return change * kept.to(change.device) / self.density


def _nearest(whole: LowRank, rank: int) -> LowRank:
    """The nearest change of rank ``rank``. The large matrix itself is never formed."""
    q_b, r_b = torch.linalg.qr(whole.b.double())
    q_a, r_a = torch.linalg.qr(whole.a.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    if rank > len(s):
        raise ConfigError(f"combine: rank={rank} is more than the {len(s)} that the sum of the adapters can have.")
    a, b = vh[:rank] @ q_a.T, q_b @ (u[:, :rank] * s[:rank])
    return LowRank(a.to(whole.a.dtype).contiguous(), b.to(whole.b.dtype), 1.0)


def _largest(change: Tensor, density: float) -> Tensor:
    """``change`` with zeros in all but the share ``density`` of its entries that is largest in magnitude."""
    if density == 1:
        return change
    flat = change.flatten()
    kept = torch.zeros_like(flat)
    kept[flat.abs().topk(int(density * flat.numel())).indices] = 1
    return change * kept.view_as(change)
