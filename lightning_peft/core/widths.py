"""How many features a module puts out, told from the last layer inside it."""

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_peft.core.hosts import ConvLayout, weights_of
from lightning_peft.core.norms import is_norm
from lightning_peft.core.walk import base_modules


@dataclass(frozen=True)
class Width:
    """The features of an output, and the dimension that holds them: 1 behind a convolution, else -1."""

    features: int
    dim: int


def width_of(module: nn.Module) -> Width | None:
    """The width of what ``module`` puts out; None where no layer inside it tells."""
    last: Width | None = None
    for _, inner in base_modules(module):
        if weights := weights_of(inner):
            layout = weights[-1].layout
            last = Width(layout.out_features, 1 if isinstance(layout, ConvLayout) else -1)
        elif isinstance(inner, nn.RNNBase):
            last = Width((inner.proj_size or inner.hidden_size) * (1 + inner.bidirectional), -1)
        elif is_norm(inner):
            channels = isinstance(inner, (_NormBase, nn.GroupNorm))
            last = Width(inner.get_parameter("weight").numel(), 1 if channels else -1)
    return last
