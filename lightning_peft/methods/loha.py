r"""LoHa: the elementwise product of two low-rank products. Hyeon-Woo et al., 2021, arXiv:2108.06098 (FedPara).

.. math:: W' = W + s\,(B_1 A_1) \odot (B_2 A_2), \qquad s = \alpha / r

with :math:`A_i \in R^{r \times in}` and :math:`B_i \in R^{out \times r}`: a rank of up to r² from 2r(in + out)
parameters. A₂ starts at zero, so training starts from the base model; the others as in He et al., 2015.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.components.delta import Delta, DeltaOutput, DeltaWeight
from lightning_peft.components.ranked import RankedMethod
from lightning_peft.core.adapter import Adapter, adapter_dtype
from lightning_peft.core.fields import Positive
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.network.hosts import Host
from lightning_peft.network.layouts import ConvLayout, Layout


@dataclass(frozen=True, kw_only=True)
class LoHa(RankedMethod):
    """A Hadamard product of low-rank updates of linear, convolution, embedding and attention layers.

    Raises:
        ConfigError: a field is out of range.
    """

    peft: ClassVar[PeftTable | None] = PeftTable(
        type="LOHA",
        fields={"r": "r", "alpha": "alpha"},
        tensors={f"hada_w{i}_{half}": f"hada_w{i}_{half}" for i in "12" for half in "ab"},
        layouts=(Layout, ConvLayout),
        rank=("hada_w1_b",),
        harmless=("rank_dropout", "module_dropout", "init_weights"),  # they act in training, and before it
    )

    alpha: Positive = 8.0
    """Numerator of the scale."""

    def build(self, host: Host, shared: Any) -> Adapter:
        kind = LoHaWeight if host.weight_only else LoHaOutput
        return kind(host, self.rank_of(host), self.scale_of(host))


class _Factors(Delta):
    """The four factors."""

    def __init__(self, host: Host, r: int, scale: float) -> None:
        super().__init__(host)
        self.rank, self.scale = r, scale
        like: dict[str, Any] = {"device": host.weight.device, "dtype": adapter_dtype(host.weight)}
        sizes = host.layout.out_features, host.layout.in_features
        self.hada_w1_a, self.hada_w2_a = (nn.Parameter(torch.empty(sizes[0], r, **like)) for _ in "12")  # (out, r)
        self.hada_w1_b, self.hada_w2_b = (nn.Parameter(torch.empty(r, sizes[1], **like)) for _ in "12")  # (r, in)
        for factor in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        nn.init.zeros_(self.hada_w2_b)

    def delta(self) -> Tensor:
        return self.scale * (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)


class LoHaOutput(_Factors, DeltaOutput):
    """Adds what the update makes of the host's input to its output."""


class LoHaWeight(_Factors, DeltaWeight):
    """Adds the update to a weight that its host reads itself."""
