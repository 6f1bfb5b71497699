"""The adapters of a model: what there is, and what it is called."""

from dataclasses import dataclass

from torch import nn

from lightning_peft.core.method import Method
from lightning_peft.injection.inject import check_name, keys_of
from lightning_peft.injection.registry import find_adapter, registries


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter of a model."""

    name: str
    method: Method
    active: bool
    """True if it acts."""
    parameters: int
    """How many parameters it has, those of modules fully trained included."""


def adapters(model: nn.Module) -> tuple[AdapterInfo, ...]:
    """The adapters of ``model``, in the order in which they came."""
    found = []
    for _, _, registry in registries(model):
        for name, attachment in registry.attachments.items():
            sizes = {id(p): p.numel() for _, adapter in registry.adapters(name) for p in adapter.parameters()}
            found.append(AdapterInfo(name, attachment.method, name in registry.acting(), sum(sizes.values())))
    return tuple(found)


def rename(model: nn.Module, old: str, new: str) -> None:
    """Call the adapter ``old`` by another name from now on. No tensor is touched: optimizers go on with it.

    Its parameters are called after it, so files of it that are written from now on have the new name too.

    Raises:
        AdapterNameError: there is no such adapter, or the new name is taken or cannot be one.
    """
    _, owner, registry = find_adapter(model, old)
    registry.check_settled()
    check_name(new, registry)
    for slots in registry.slots.values():
        slots.rename(old, new)
    registry.attachments = {new if name == old else name: a for name, a in registry.attachments.items()}
    registry.scopes.rename(old, new)
    registry.active = tuple(new if name == old else name for name in registry.active)
    registry.attachments[new].keys = keys_of(owner, {id(adapter) for _, adapter in registry.adapters(new)})
