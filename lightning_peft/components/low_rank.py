r"""What methods share whose adapter is a product of two factors beside a frozen weight.

.. math:: s B A, \qquad A \in R^{r \times in}, B \in R^{out \times r}, \qquad s = \alpha / r

with :math:`\alpha / \sqrt r` for rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732). Here are the fields, the choice of
rank and scale for each layer, the factors, and the peft package's form of them; what is computed with the factors is
each method's own.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, OutputAdapter, adapter_dtype
from lightning_peft.core.fields import Count, Positive, Probability
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.core.recipes import LowRank, Recipe
from lightning_peft.core.targeted import LayerMethod
from lightning_peft.errors import NotApplicableError, TargetError
from lightning_peft.network.hosts import Host
from lightning_peft.network.layouts import ConvLayout, EmbeddingLayout
from lightning_peft.network.patterns import matches_end, pattern_value

LORA = PeftTable(
    type="LORA",
    fields={"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "use_rslora": "use_rslora"},
    rank=("lora_A.weight", "lora_embedding_A"),
    # What only says how the factors started; those that change the base when they start do not stand here.
    harmless=("loftq_config", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"),
)


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(LayerMethod):
    """Two factors beside each chosen weight.

    Raises:
        ConfigError: a field is out of range.
    """

    peft: ClassVar[PeftTable | None] = LORA

    r: Count = 8
    """Rank of the update; above the smaller side of a layer's matrix it adds parameters and nothing else."""
    alpha: Positive = 16.0
    """Numerator of the scale, greater than 0."""
    dropout: Probability = 0.0
    """Probability of dropping an input feature of A, 0 to 1 (exclusive). Embeddings, fed with indices, are exempt."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) in place of alpha / r."""
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    """Ranks of layers whose name ends in the key (a suffix or a regular expression)."""
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)
    """Alphas of layers whose name ends in the key (a suffix or a regular expression)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise self.invalid(name, f"keyed by suffixes or regular expressions ({error})") from error

    def select(self, model: nn.Module, fully_trained: Sequence[str]) -> list[Host]:
        hosts = super().select(model, fully_trained)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                if not any(matches_end(pattern, host.name) for host in hosts):
                    raise TargetError(
                        f"{type(self).__name__}.{name}: {pattern!r} matches none of the {len(hosts)} adapted layers, "
                        f"such as '{hosts[0].name}'."
                    )
        return hosts

    @abstractmethod
    def build_output(self, host: Host, r: int, scale: float) -> Adapter:
        """Build the adapter that acts on the output of ``host``."""

    @abstractmethod
    def build_weight(self, host: Host, r: int, scale: float) -> Adapter:
        """Build the adapter that acts on the weight which ``host`` reads itself; there is no dropout then."""

    def notes(self, hosts: Sequence[Host]) -> list[str]:
        ranks = {host.name: pattern_value(self.rank_pattern, host.name, self.r) for host in hosts}
        full = {host.name: min(host.layout.out_features, host.layout.in_features) for host in hosts}
        above = [name for name, r in ranks.items() if r > full[name]]
        if not above:
            return []
        return [
            f"the rank is larger than the smaller side of {len(above)} layers, such as {ranks[above[0]]} at "
            f"'{above[0]}', which can use {full[above[0]]}"
        ]

    def build(self, host: Host, shared: Any) -> Adapter:
        r = pattern_value(self.rank_pattern, host.name, self.r)
        alpha = pattern_value(self.alpha_pattern, host.name, self.alpha)
        scale = alpha / math.sqrt(r) if self.use_rslora else alpha / r
        if not host.weight_only:
            return self.build_output(host, r, scale)
        if self.dropout:
            raise NotApplicableError(
                f"{type(self).__name__}.dropout={self.dropout} cannot act on '{host.name}': "
                f"{type(host.module).__name__} reads that weight itself, so there is no input to drop from. "
                "Set dropout=0 or exclude it (exclude_modules)."
            )
        return self.build_weight(host, r, scale)


class LowRankFactors(Adapter):
    """The two factors, wherever they act."""

    def __init__(self, host: Host, r: int, scale: float) -> None:
        super().__init__()
        self.layout, self.scale = host.layout, scale
        self.lora_A, self.lora_B = _factors(host, r)  # (r, in), (out, r)

    @property
    def rank(self) -> int:
        """The rank of the product."""
        return len(self.lora_A)

    def low_rank(self) -> LowRank | None:
        return LowRank(self.lora_A, self.lora_B, self.scale)

    def combine(self, sources: Sequence[Any], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        made = recipe.mix_low_rank([LowRank(source.lora_A, source.lora_B, source.scale) for source in sources])
        self.lora_A, self.lora_B, self.scale = nn.Parameter(made.a), nn.Parameter(made.b), made.scale

    def delta(self, weight: Tensor) -> Tensor:
        """``s * B A`` in the shape and dtype of ``weight``."""
        return self.layout.native(self.scale * (self.lora_B @ self.lora_A)).to(weight.dtype)

    def peft_tensors(self) -> dict[str, Tensor]:
        """The parameters by peft's names and in its shapes; empty where peft would compute something else."""
        return {}


class LowRankOutput(LowRankFactors, OutputAdapter):
    """The two factors where they act on the host's output."""

    def __init__(self, host: Host, r: int, scale: float, dropout: float) -> None:
        super().__init__(host, r, scale)
        self.dropout = dropout

    def dropout_of(self, x: Tensor) -> float:
        """The probability with which features of ``x`` are dropped now: an index has none."""
        return self.dropout if self.training and x.is_floating_point() else 0.0

    def peft_tensors(self) -> dict[str, Tensor]:
        layout, a, b = self.layout, self.lora_A.detach(), self.lora_B.detach()
        if isinstance(layout, EmbeddingLayout):
            return {"lora_embedding_A": a, "lora_embedding_B": b}
        if isinstance(layout, ConvLayout):
            # peft's factors have no dilation and no padding mode, and with groups the second one has groups as well.
            if layout.groups > 1 or set(layout.dilation) != {1} or layout.padding_mode != "zeros":
                return {}
            a, b = layout.native(a), b.view(*b.shape, *[1] * len(layout.kernel))
        return {"lora_A.weight": a, "lora_B.weight": b}


def _factors(host: Host, r: int) -> tuple[nn.Parameter, nn.Parameter]:
    layout = host.layout
    like: Any = {"device": host.weight.device, "dtype": adapter_dtype(host.weight)}
    if isinstance(layout, EmbeddingLayout):
        # A row of A belongs to one token: starting from zero, each moves when it is first seen.
        a, b = torch.zeros(r, layout.in_features, **like), torch.empty(layout.out_features, r, **like).normal_()
    else:
        bound = 1 / math.sqrt(layout.in_features)  # Kaiming's for uniform numbers, with the paper's a = sqrt(5)
        a = torch.empty(r, layout.in_features, **like).uniform_(-bound, bound)
        b = torch.zeros(layout.out_features, r, **like)
    return nn.Parameter(a), nn.Parameter(b)
