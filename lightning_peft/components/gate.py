"""A gate that decides how much an adapter acts. Mao et al., 2022, arXiv:2110.07577 (UniPELT)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.components.taps import Tap
from lightning_peft.core.adapter import InputAdapter
from lightning_peft.network.calls import first_input


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


class GatedInput(InputAdapter):
    """Puts a gate's value for the host's first input into a tap, and changes nothing."""

    def __init__(self, gate: Gate, tap: Tap, batch_dim: int = 0) -> None:
        super().__init__()
        self.gate, self.tap, self.batch_dim = gate, tap, batch_dim

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_input(args, kwargs)
        if x.dim() == 2:  # one sequence without a batch
            self.tap.value = self.gate(x[None])[0]
        else:
            self.tap.value = self.gate(x.transpose(0, 1) if self.batch_dim else x)
        return args, kwargs
