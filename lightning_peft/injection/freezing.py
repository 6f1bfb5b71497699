"""Freezing a base: no gradients, no running statistics that drift, and strict loading without the base's own keys."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_peft.injection.registry import Registry, registry_of
from lightning_peft.injection.slots import AdapterSlots
from lightning_peft.injection.standins import Changes, HeldForward
from lightning_peft.network.quantized.weights import quantized_weights
from lightning_peft.network.walk import CHILD, base_modules, join, plain_name


def freeze(model: nn.Module, registry: Registry) -> None:
    """Freeze ``model`` and note in ``registry`` how to undo it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    registry.trained_before = frozenset(name for name, parameter in parameters.items() if parameter.requires_grad)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for _, module in base_modules(model):
        if isinstance(module, _NormBase) and module.running_mean is not None:
            registry.handles.append(_EvalForward(module))
        elif isinstance(module, nn.TransformerEncoder):
            registry.handles.append(_PaddedForward(module))
    registry.handles.append(model.register_load_state_dict_pre_hook(_complete_with_base))


def unfreeze(model: nn.Module, registry: Registry) -> None:
    """Undo :func:`freeze`."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in registry.trained_before:
            parameter.requires_grad_(True)
    for handle in reversed(registry.handles):
        handle.remove()
    registry.handles.clear()


class _EvalForward(HeldForward):
    """Runs a frozen norm in eval mode, whatever mode it is in, unless an adapter has statistics of its own in place.

    In train mode it would still move its running statistics, which no adapter file holds. Its own flag stays as it is,
    so that ``model.train()`` and Lightning's checks see the mode that the user has set.
    """

    def changes(self) -> Changes | None:
        slots = self.host._modules.get(CHILD)
        own = isinstance(slots, AdapterSlots) and slots.replaces("running_mean")
        return ({"training": False}, ()) if self.host.training and not own else None


class _PaddedForward(HeldForward):
    """Keeps a frozen encoder in eval from packing padded input into a nested tensor while adapters act inside it.

    Torch does that where nothing of the encoder trains, and then asks for the fused attention, which hooks rule out;
    few operations that an adapter may need know nested tensors.
    """

    def changes(self) -> Changes | None:
        encoder: Any = self.host
        if not encoder.use_nested_tensor:
            return None
        acting = any(isinstance(module, AdapterSlots) and module.active for module in encoder.modules())
        return ({"use_nested_tensor": False}, ()) if acting or torch.is_grad_enabled() else None


def _complete_with_base(model: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let a state dict that holds adapters alone load strictly: the base's part is taken to be what is here.

    A state dict with some of the base's keys is left alone, so that torch's own check still finds what it lacks. Plain
    names, as files have them, become those that the modules have here.
    """
    registry = registry_of(model)
    if registry is None:
        return
    own = registry.own_keys()
    # keep_vars: torch skips the copy of a tensor onto itself, so this costs nothing.
    here = {f"{prefix}{key}": value for key, value in model.state_dict(keep_vars=True).items()}
    for key in here:
        if key not in state_dict and (plain := plain_name(key)) in state_dict:
            state_dict[key] = state_dict.pop(plain)
    base = {key: value for key, value in here.items() if key.removeprefix(prefix) not in own}
    if not state_dict.keys() & base.keys():
        # What belongs to a quantized weight is in the state dict of some layers that do not load it again.
        for path, module, _, weight in quantized_weights(model):
            for name in weight.beside - module._parameters.keys() - module._buffers.keys():
                base.pop(prefix + join(path, name), None)
        state_dict.update(base)
