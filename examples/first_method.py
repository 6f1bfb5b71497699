r"""A method from a paper in one file: SSF, scaling and shifting features. Lian et al., 2022, arXiv:2210.08823.

.. math:: y = \gamma \odot (W x + b) + \beta

γ starts at one and β at zero, so training starts from the base model. Run it to see it trained, merged and refused;
`make contract METHOD=examples/first_method.py` runs all that a method must hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import inject, merge
from lightning_peft.core.adapter import OutputAdapter, adapter_dtype
from lightning_peft.core.targeted import LayerMethod
from lightning_peft.errors import NotMergeableError
from lightning_peft.network.hosts import Host


@dataclass(frozen=True, kw_only=True)
class SSF(LayerMethod):
    """A scale and a shift for each output feature of linear, convolution and embedding layers."""

    def build(self, host: Host, shared: Any) -> "ScaleAndShift":
        return ScaleAndShift(host)


class ScaleAndShift(OutputAdapter):
    """γ ⊙ y + β."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.layout, self.bias = host.layout, host.bias
        like: dict[str, Any] = {"device": host.weight.device, "dtype": adapter_dtype(host.weight)}
        self.scale = nn.Parameter(torch.ones(host.layout.out_features, **like))
        self.shift = nn.Parameter(torch.zeros(host.layout.out_features, **like))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale, shift = (self.layout.channels(p.to(y.dtype)) for p in (self.scale, self.shift))
        return y * scale + shift

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.bias:
            raise NotMergeableError("it shifts an output that has no bias to take the shift. Keep it as an adapter.")
        matrix = self.layout.matrix(parameters["weight"]) * self.scale[:, None]
        return {"weight": self.layout.native(matrix), self.bias: parameters[self.bias] * self.scale + self.shift}


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    print(inject(model, SSF()))
    x, goal = torch.randn(64, 8), torch.randint(2, (64,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(101):
        loss = nn.functional.cross_entropy(model(x), goal)
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted = model(x)
    merge(model)
    print(f"merged: the outputs differ by {(model(x) - adapted).abs().max():.0e}")
