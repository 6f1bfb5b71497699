"""A gate that decides how much an adapter acts. Mao et al., 2022, arXiv:2110.07577 (UniPELT)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter


class Gate(nn.Module):
    r"""One number from 0 to 1 for each sequence: the mean over its positions of :math:`\sigma(w x + b)`.

    Starts near a half, with a small random w and b = 0.

    Args:
        features: of the input.
        like: a tensor with the dtype and the device of the parameters.
        batch_dim: the dimension of the input that counts the sequences.
    """

    needs_whole_sequences = True

    def __init__(self, features: int, like: Tensor, batch_dim: int = 0) -> None:
        super().__init__()
        self.batch_dim = batch_dim
        self.weight = nn.Parameter(torch.empty(1, features, device=like.device, dtype=like.dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=like.device, dtype=like.dtype))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, features) to (batch, 1, 1); each row of (rows, features) is a sequence by itself."""
        gates = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).sigmoid()
        positions = [dim for dim in range(x.dim() - 1) if dim != self.batch_dim]
        return gates.mean(positions, keepdim=True) if x.dim() > 2 else gates


class InputGate(Adapter):
    """A gate over what its host is called with. It does not act by itself: the adapter that it scales asks it."""

    def __init__(self, gate: Gate, batch_dim: int = 0) -> None:
        super().__init__()
        self.gate, self.batch_dim = gate, batch_dim

    def forward(self, x: Tensor) -> Tensor:
        """Map the host's first input, (batch, length, features) or as ``batch_dim`` says, to (batch, 1, 1)."""
        if x.dim() == 2:  # one sequence without a batch
            return self.gate(x[None])[0]  # type: ignore[no-any-return]
        return self.gate(x.transpose(0, 1) if self.batch_dim else x)  # type: ignore[no-any-return]
