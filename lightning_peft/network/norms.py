"""The normalisation layers of a network, by torch's classes or by structure, and how wide a module's output is."""

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # of every BatchNorm, SyncBatchNorm and InstanceNorm
from torch.nn.parameter import UninitializedParameter

from lightning_peft.network.hosts import weights_of
from lightning_peft.network.layouts import ConvLayout
from lightning_peft.network.walk import CHILD, base_modules

_TORCH = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)


def find_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every norm of ``model`` that has parameters, as (path, module), in the order of its modules.

    Torch's norms, and every module that looks like one: without children, with one vector ``weight``, with or without a
    vector ``bias``, and nothing else to learn (``LlamaRMSNorm``, ``T5LayerNorm``).
    """
    return [(path, module) for path, module in base_modules(model) if is_norm(module)]


def is_norm(module: nn.Module) -> bool:
    """True if ``module`` is a norm that has parameters."""
    parameters = dict(module.named_parameters(recurse=False))
    if not parameters or isinstance(module, _TORCH):
        return bool(parameters)
    vectors = all(not isinstance(p, UninitializedParameter) and p.dim() == 1 for p in parameters.values())
    leaf = all(name == CHILD or child is None for name, child in module._modules.items())
    known = isinstance(module, nn.PReLU) or weights_of(module)
    return vectors and leaf and "weight" in parameters and parameters.keys() <= {"weight", "bias"} and not known


@dataclass(frozen=True)
class Width:
    """The features of an output, and the dimension that holds them: 1 behind a convolution, else -1."""

    features: int
    dim: int


def width_of(module: nn.Module) -> Width | None:
    """The width of what ``module`` puts out; None where no layer inside it tells."""
    last: Width | None = None
    for _, inner in base_modules(module):
        # The last that tells counts: activations and dropout behind it keep its width.
        if weights := weights_of(inner):
            layout = weights[-1].layout
            last = Width(layout.out_features, 1 if isinstance(layout, ConvLayout) else -1)
        elif isinstance(inner, nn.RNNBase):
            last = Width((inner.proj_size or inner.hidden_size) * (1 + inner.bidirectional), -1)
        elif is_norm(inner):
            channels = isinstance(inner, (_NormBase, nn.GroupNorm))
            last = Width(inner.get_parameter("weight").numel(), 1 if channels else -1)
    return last
