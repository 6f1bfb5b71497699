r"""What methods share whose adapter is a product of two factors beside a frozen weight.

.. math:: s B A, \qquad A \in R^{r \times in}, B \in R^{out \times r}, \qquad s = \alpha / r

with :math:`\alpha / \sqrt r` for rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732). Here are the fields and
the factors; what is computed with the factors is each method's own.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.components.ranked import RankedMethod
from lightning_peft.core.adapter import Adapter, OutputAdapter, adapter_dtype
from lightning_peft.core.fields import Probability
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.core.recipes import LowRank, Recipe
from lightning_peft.kernels.low_rank import plain_update, update_
from lightning_peft.network.hosts import Host
from lightning_peft.network.layouts import ConvLayout, EmbeddingLayout, Layout, TransposedLayout

LORA = PeftTable(
    type="LORA",
    fields={"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "use_rslora": "use_rslora"},
    layouts=(Layout, TransposedLayout, ConvLayout, EmbeddingLayout),
    rank=("lora_A.weight", "lora_embedding_A"),
    # How the factors started. An initialisation that changes the base is not harmless, and does not stand here.
    harmless=(
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    ),
)


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(RankedMethod):
    """Two factors beside each chosen weight.

    Raises:
        ConfigError: a field is out of range.
    """

    peft: ClassVar[PeftTable | None] = LORA

    dropout: Probability = 0.0
    """Probability of dropping an input feature of A. Embeddings, fed with indices, are exempt."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) in place of alpha / r."""

    def scaled(self, alpha: float, r: int) -> float:
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    @abstractmethod
    def build_output(self, host: Host, r: int, scale: float) -> Adapter:
        """Build the adapter that acts on the output of ``host``."""

    @abstractmethod
    def build_weight(self, host: Host, r: int, scale: float) -> Adapter:
        """Build the adapter that acts on the weight which ``host`` reads itself; there is no dropout then."""

    def build(self, host: Host, shared: Any) -> Adapter:
        r, scale = self.rank_of(host), self.scale_of(host)
        self.check_input(host, "dropout")
        build = self.build_weight if host.weight_only else self.build_output
        return build(host, r, scale)


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

    def update(self, x: Tensor, y: Tensor, scale: Any) -> Tensor:
        """``y + scale * B A x`` in a new tensor."""
        return plain_update(self.layout, x, y, self.lora_A, self.lora_B, scale, self.dropout_of(x))

    def update_(self, x: Tensor, y: Tensor) -> Tensor:
        """``y + s * B A x``, written into ``y``."""
        return update_(self.layout, x, y, self.lora_A, self.lora_B, self.scale, self.dropout_of(x))

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
