r"""LoRA: low-rank adaptation. Hu et al., 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski, 2023, arXiv:2312.03732.

.. math:: y = W x + s B A x, \qquad A \in R^{r \times in}, B \in R^{out \times r}, \qquad s = \alpha / r

with :math:`\alpha / \sqrt r` for rsLoRA. B starts at zero, so training starts from the base model.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_peft.components.gate import Gate
from lightning_peft.components.low_rank import LowRankFactors, LowRankMethod, LowRankOutput
from lightning_peft.components.low_rank_rows import ByRow
from lightning_peft.core.adapter import Adapter, BatchedForm, WeightAdapter
from lightning_peft.core.recipes import Recipe
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.hosts import Host
from lightning_peft.network.layouts import Layout, TransposedLayout


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRankMethod):
    """Low-rank adaptation of linear, convolution, embedding and attention layers.

    Raises:
        ConfigError: a field is out of range.
    """

    gating: bool = False
    """True if a gate from the layer's input (batch, length, features), from 0 to 1, scales the update (UniPELT). Then
    it cannot be merged."""

    def combined(self, adapters: Mapping[str, Adapter]) -> "LoRA":
        ranks = {name: len(factors.a) for name, adapter in adapters.items() if (factors := adapter.low_rank())}
        r = max(ranks.values())
        others = {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != r}
        # Alpha is r, so that the scale is one: the weights and scales of the adapters went into the factors.
        alphas = {name: float(rank) for name, rank in others.items()}
        return replace(self, r=r, alpha=float(r), use_rslora=False, rank_pattern=others, alpha_pattern=alphas)

    def build_output(self, host: Host, r: int, scale: float) -> Adapter:
        if self.gating and not host.linear:
            raise self._no_gate(host)
        return LoRAOutput(host, r, scale, self.dropout, self.gating)

    def build_weight(self, host: Host, r: int, scale: float) -> Adapter:
        if self.gating:
            raise self._no_gate(host)
        return LoRAWeight(host, r, scale)

    def _no_gate(self, host: Host) -> NotApplicableError:
        return NotApplicableError(
            f"LoRA.gating cannot act on '{host.name}' ({type(host.module).__name__}): a gate reads the features "
            "that enter a linear layer. Set gating=False or exclude it (exclude_modules)."
        )


class LoRAOutput(LowRankOutput):
    """Adds ``s * B A x`` to the host's output, times a gate if there is one."""

    additive = True

    def __init__(self, host: Host, r: int, scale: float, dropout: float, gating: bool) -> None:
        super().__init__(host, r, scale, dropout)
        self.gate = Gate(host.layout.in_features, self.lora_A) if gating else None
        self.in_place = host.owns_output and not gating

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale = self.scale if self.gate is None else self.scale * self.gate(x)
        return self.update(x, y, scale)

    def forward_(self, x: Tensor, y: Tensor) -> Tensor:
        return self.update_(x, y)

    @classmethod
    def batched(cls, adapters: Sequence["LoRAOutput"]) -> BatchedForm | None:
        alike = all(a.gate is None and a.dropout == adapters[0].dropout for a in adapters)
        linear = all(type(a.layout) in (Layout, TransposedLayout) for a in adapters)
        return ByRow(adapters) if alike and linear else None

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.gate is not None:
            return super().merge(parameters)
        weight = parameters["weight"]
        return {"weight": weight + self.delta(weight)}

    def combine(self, sources: Sequence[Any], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        if any(source.gate is not None for source in sources):
            raise NotApplicableError("a gate scales it, which differs from input to input (gating).")
        super().combine(sources, recipe, parameters)

    def peft_tensors(self) -> dict[str, Tensor]:
        return {} if self.gate else super().peft_tensors()  # peft has no gate


class LoRAWeight(LowRankFactors, WeightAdapter):
    """Adds ``s * B A`` to a weight that its host reads itself."""

    additive = True

    def __init__(self, host: Host, r: int, scale: float) -> None:
        super().__init__(host, r, scale)
        self.names = (host.parameter,)

    def forward(self, weight: Tensor, name: str) -> Tensor:
        return weight + self.delta(weight)
