"""The normalisation layers of a network, known by torch's classes and, for those that others write, by structure."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # of every BatchNorm, SyncBatchNorm and InstanceNorm
from torch.nn.parameter import UninitializedParameter

from lightning_peft.core.hosts import weights_of
from lightning_peft.core.walk import CHILD, base_modules

_TORCH = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)


def find_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every norm of ``model`` that has parameters, as (path, module), in the order of its modules.

    Torch's norms, and every module that looks like one: without children, with one vector ``weight``, with or without a
    vector ``bias``, and nothing else to learn (``LlamaRMSNorm``, ``T5LayerNorm``).
    """
    return [(path, module) for path, module in base_modules(model) if is_norm(module)]


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm that has parameters."""
    parameters = dict(module.named_parameters(recurse=False))
    if not parameters or isinstance(module, _TORCH):
        return bool(parameters)
    vectors = all(not isinstance(p, UninitializedParameter) and p.dim() == 1 for p in parameters.values())
    leaf = all(name == CHILD or child is None for name, child in module._modules.items())
    known = isinstance(module, nn.PReLU) or weights_of(module)
    return vectors and leaf and "weight" in parameters and parameters.keys() <= {"weight", "bias"} and not known
