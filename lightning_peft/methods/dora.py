r"""DoRA: weight-decomposed low-rank adaptation. Liu et al., 2024, arXiv:2402.09353.

.. math:: y = c \odot (W x + s B A x) + b, \qquad c = m / \|W + s B A\|

The norm is taken over each output's weights (a row of W, a kernel, a dimension of an embedding), and a constant to the
backward (section 4.3). B starts at zero and m at :math:`\|W\|`, so training starts from the base model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_peft.components.low_rank import LORA, LowRankMethod
from lightning_peft.components.rescaled import Rescaled, RescaledOutput, squared_norms
from lightning_peft.core.adapter import Adapter, WeightAdapter
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.errors import NotApplicableError
from lightning_peft.kernels.low_rank import is_recorded
from lightning_peft.network.hosts import Host
from lightning_peft.network.quantized.weights import is_quantized, plain_weight


@dataclass(frozen=True, kw_only=True)
class DoRA(LowRankMethod):
    """LoRA with a learned norm for each output of linear, convolution, embedding and attention layers.

    Dropout drops features on the way to A alone; what the base's weights read is whole.

    Raises:
        ConfigError: a field is out of range.
        NotApplicableError: a layer's weight is quantized in a way that is not known: its norm cannot be had.
    """

    peft: ClassVar[PeftTable | None] = replace(LORA, marks={"use_dora": True})

    def build(self, host: Host, shared: Any) -> Adapter:
        weight = plain_weight(host.module, host.parameter) if is_quantized(host.weight) else host.weight
        shape = host.layout.out_features, host.layout.in_features
        known = weight.is_floating_point() and weight.dtype.itemsize > 1
        if not known or host.layout.matrix(weight).shape != shape:
            raise NotApplicableError(
                f"DoRA needs the norm of the weights of '{host.name}' ({type(host.module).__name__}), and these are "
                f"quantized or not all there ({weight.dtype}, {list(weight.shape)} for a matrix of {list(shape)}). "
                "Use LoRA, or exclude it (exclude_modules)."
            )
        return super().build(host, shared)

    def build_output(self, host: Host, r: int, scale: float) -> Adapter:
        return DoRAOutput(host, r, scale, self.dropout)

    def build_weight(self, host: Host, r: int, scale: float) -> Adapter:
        return DoRAWeight(host, r, scale)


class DoRAOutput(RescaledOutput):
    """Acts on the output of its host."""

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = parameters["weight"]
        c = (self.lora_magnitude_vector / self.norm()).to(weight.dtype)
        matrix = self.layout.matrix(weight + self.delta(weight))
        merged = {"weight": self.layout.native(c[:, None] * matrix)}
        if (own := self.bias()) is None:
            return merged
        # What another part of this adapter has added to the bias is rescaled, as it is in the output.
        own, bias = own.to(weight.dtype), parameters[self._bias]
        unchanged = not is_recorded() and torch.equal(bias, own)
        return merged if unchanged else {**merged, self._bias: own + c * (bias - own)}

    def peft_tensors(self) -> dict[str, Tensor]:
        factors, m = super().peft_tensors(), self.layout.channels(self.lora_magnitude_vector.detach())
        return {**factors, "lora_magnitude_vector": m[None] if m.dim() > 1 else m} if factors else {}


class DoRAWeight(Rescaled, WeightAdapter):
    """Adds ``s * B A`` to a weight that its host reads itself, and rescales its rows."""

    def __init__(self, host: Host, r: int, scale: float) -> None:
        super().__init__(host, r, scale)
        self.names = (host.parameter,)

    def forward(self, weight: Tensor, name: str) -> Tensor:
        matrix = self.layout.matrix(weight + self.delta(weight))
        m = self.lora_magnitude_vector
        squares = squared_norms(matrix.detach(), m.dtype)  # here it is formed anyway
        c = m / squares.clamp(min=torch.finfo(m.dtype).tiny).sqrt()
        return self.layout.native(matrix * c[:, None]).to(weight.dtype)
