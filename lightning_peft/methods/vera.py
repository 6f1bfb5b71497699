r"""VeRA: vector-based random matrix adaptation. Kopiczko et al., 2023, arXiv:2310.11454.

.. math:: y = W x + b \odot (B\,(d \odot (A x))), \qquad A \in R^{r \times in}, B \in R^{out \times r}

A and B are drawn once from a seed, frozen, and shared by all layers, each of which takes as much of them as it is wide;
d (r) and b (out) train. b starts at zero, so training starts from the base model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.components.delta import Delta, DeltaOutput, DeltaWeight
from lightning_peft.core.adapter import Adapter, Reference, adapter_dtype
from lightning_peft.core.fields import Count, Finite, Must, Probability
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.core.targeted import LayerMethod
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.hosts import Host
from lightning_peft.network.layouts import EmbeddingLayout, Layout, TransposedLayout


@dataclass(frozen=True, kw_only=True)
class VeRA(LayerMethod):
    """Two vectors for each linear, convolution or attention layer, beside shared random matrices.

    Raises:
        ConfigError: a field is out of range.
        NotApplicableError: an embedding is named: the shared matrix would be as wide as the vocabulary.
    """

    peft: ClassVar[PeftTable | None] = PeftTable(
        type="VERA",
        fields={
            "r": "r",
            "projection_prng_key": "projection_prng_key",
            "save_projection": "save_projection",
            "d_initial": "d_initial",
            "dropout": "vera_dropout",
        },
        tensors={"lambda_d": "vera_lambda_d", "lambda_b": "vera_lambda_b"},
        shared={"A": "vera_A", "B": "vera_B"},
        layouts=(Layout, TransposedLayout),
        harmless=("init_weights",),
    )

    r: Count = 256
    """Rows of A."""
    projection_prng_key: Annotated[int, Must("a whole number, at least 0", lambda n: n >= 0)] = 0
    """Seed of A and B."""
    save_projection: bool = True
    """Store A and B in files, which are then safe from a change of torch's generator."""
    d_initial: Finite = 0.1
    """What d starts from."""
    dropout: Probability = 0.0
    """Probability of dropping an input feature of A."""

    def shared(self, hosts: Sequence[Host]) -> Adapter:
        return Projections(self, hosts)

    def build(self, host: Host, shared: Any) -> Adapter:
        if isinstance(host.layout, EmbeddingLayout):
            raise NotApplicableError(f"VeRA cannot adapt '{host.name}': A would be as wide as its vocabulary.")
        self.check_input(host, "dropout")
        return (VeRAWeight if host.weight_only else VeRAOutput)(self, host, shared)


class Projections(Adapter):
    """A and B, as wide as the widest of the layers. They do not train."""

    A: Tensor
    B: Tensor

    def __init__(self, method: VeRA, hosts: Sequence[Host]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(method.projection_prng_key)
        sizes = [max(getattr(h.layout, side) for h in hosts) for side in ("in_features", "out_features")]
        for name, shape in {"A": (method.r, sizes[0]), "B": (sizes[1], method.r)}.items():
            bound = math.sqrt(6 / shape[1])  # He et al., 2015
            # The same numbers under every default dtype and device.
            drawn = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(hosts[0].weight.device), persistent=method.save_projection)


class _Vectors(Delta):
    """d and b."""

    def __init__(self, method: VeRA, host: Host, shared: Projections) -> None:
        super().__init__(host)
        self._shared, self.dropout = Reference(shared), method.dropout
        like: dict[str, Any] = {"device": host.weight.device, "dtype": adapter_dtype(host.weight)}
        self.lambda_d = nn.Parameter(torch.full((method.r,), float(method.d_initial), **like))
        self.lambda_b = nn.Parameter(torch.zeros(host.layout.out_features, **like))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The products d ⊙ A (r, in) and b ⊙ B (out, r), of this layer's size."""
        a, b = self._shared.module.A, self._shared.module.B
        a, b = a[:, : self.layout.in_features], b[: self.layout.out_features]
        return self.lambda_d[:, None] * a.to(self.lambda_d), self.lambda_b[:, None] * b.to(self.lambda_b)

    def delta(self) -> Tensor:
        a, b = self.factors()
        return b @ a


class VeRAOutput(_Vectors, DeltaOutput):
    """Adds the update to the host's output."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.factors()
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        h = self.layout.down(x, a.to(y.dtype))  # (..., r)
        return y + self.layout.up(h, b.to(y.dtype))


class VeRAWeight(_Vectors, DeltaWeight):
    """Adds the update to a weight that its host reads itself."""
