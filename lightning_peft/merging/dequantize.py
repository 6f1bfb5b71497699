"""Making the quantized layers of a model plain ones of torch's."""

import torch
from torch import Tensor, nn

from lightning_peft.network.pretrained import pretrained_models
from lightning_peft.network.quantized.weights import Quantized, plain_dtype, quantized_weights
from lightning_peft.network.walk import join


@torch.no_grad()
def make_plain(model: nn.Module) -> dict[str, tuple[Tensor, nn.Parameter]]:
    """Make every quantized layer of ``model`` one of torch's own, with its dequantized weight.

    The layers stay the same objects, so that hooks and adapters on them stay as well. Their dtype is that of the rest
    of the base; where nothing else has one, the one that the quantization gives.

    Returns:
        The quantized tensors and the plain ones, by name.
    """
    dtype = plain_dtype(model)
    made: dict[str, tuple[Tensor, nn.Parameter]] = {}
    plain: dict[int, nn.Parameter] = {}
    for path, module, name, weight in list(quantized_weights(model)):
        held = module._parameters[name]
        assert held is not None
        if id(held) not in plain:
            values = weight.dequantize()
            plain[id(held)] = nn.Parameter(values.to(dtype or values.dtype), requires_grad=False)
        made[join(path, name)] = held, plain[id(held)]
        _become_plain(module, weight)
        module._parameters[name] = plain[id(held)]  # at the same place among the others
        for other in module._parameters.values():
            if other is not None and other.is_floating_point():  # the bias
                other.data = other.data.to(plain[id(held)].dtype)
    for _, pretrained in pretrained_models(model) if made else ():
        if quantizer := getattr(pretrained, "hf_quantizer", None):
            quantizer.remove_quantization_config(pretrained)
    return made


def _become_plain(module: nn.Module, weight: Quantized) -> None:
    """Make ``module`` one of torch's own but for its ``weight``, which stays as it is."""
    for attribute in weight.attributes:
        vars(module).pop(attribute, None)
    for name in weight.beside:
        module._buffers.pop(name, None)
    own = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    if own is type(module):
        return
    module.__class__ = own
    # What rearranges a state dict for the quantized layer; a frozen base's own hook stays.
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if not str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("lightning_peft."):
            del hooks[key]
