"""Dropping what an adapter needed for its training alone, such as the MLP that a prefix came out of."""

import torch
from torch import nn

from lightning_peft.injection.inject import keys_of
from lightning_peft.injection.registry import find_adapter


@torch.no_grad()
def eject(model: nn.Module, name: str = "default") -> None:
    """Keep of the adapter ``name`` only what it computes with: the model computes the same with fewer parameters.

    For when training is over: optimizers hold the parameters that go. An adapter with nothing to drop stays as it is.

    Raises:
        AdapterNameError: there is no such adapter.
    """
    _, owner, registry = find_adapter(model, name)
    registry.check_settled()
    gone = [adapter for _, adapter in registry.adapters(name) if adapter.eject()]
    for slots in registry.slots.values():
        slots.drop(lambda _, adapter: any(adapter is other for other in gone))
    attachment = registry.attachments[name]
    attachment.method = attachment.method.ejected()
    attachment.keys = keys_of(owner, {id(adapter) for _, adapter in registry.adapters(name)})
