"""A network with two adapters whose second layer is computed again in the backward pass, and its gradients."""

import torch
from perturbation import adapted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import LoRA, activate


class Checkpointed(nn.Module):
    """Two layers of which the second is computed again in the backward pass."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if self.reentrant is None:
            return self.second(x)
        return checkpoint(self.second, x, use_reentrant=self.reentrant)


def two_adapters(reentrant: bool | None = None) -> nn.Module:
    """A network with the active adapter "a" and another one, the same each time; both train."""
    torch.manual_seed(0)
    net = Checkpointed(reentrant)
    for name in ("a", "b"):
        adapted(net, LoRA(r=2), name)
    activate(net, "a")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".peft." in name)
    return net


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
