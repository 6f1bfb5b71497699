"""Adapters that do something: most begin as no change at all, which would hide what is wrong with them."""

import torch
from torch import nn

from lightning_peft import inject
from lightning_peft.core.method import Method


@torch.no_grad()
def perturb(model: nn.Module, name: str | None = None, by: float = 0.3) -> nn.Module:
    """Move every trainable parameter, or those of the adapter ``name``; returns the model."""
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and (name is None or f".peft.{name}" in f".{key}"):
            parameter.add_(by * torch.randn_like(parameter))
    return model


def adapted(model: nn.Module, method: Method, name: str = "default") -> nn.Module:
    """``model`` itself, in eval mode, with an adapter that has been moved."""
    inject(model, method, name)
    return perturb(model, name).eval()
