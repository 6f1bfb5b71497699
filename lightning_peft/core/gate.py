"""A gate that decides how much an adapter acts. Mao et al., 2022, arXiv:2110.07577 (UniPELT)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gate(nn.Module):
    r"""One number from 0 to 1 for each sequence: the mean over its positions of :math:`\sigma(w x + b)`.

    Starts near a half, with a small random w and b = 0.
    """

    def __init__(self, features: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, features, device=like.device, dtype=like.dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=like.device, dtype=like.dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, features) to (batch, 1, 1)."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).sigmoid().mean(-2, keepdim=True)
