r"""OFT: orthogonal fine-tuning by blocks. Qiu et al., 2023, arXiv:2306.07280; on the input: arXiv:2506.19847 (OFTv2).

.. math:: y = W R x, \qquad R = \mathrm{diag}(R_1, \ldots), \qquad R_i = (I + Q_i)(I - Q_i)^{-1}, \qquad Q_i = -Q_i^T

What trains are the entries of each :math:`Q_i` (b × b) above its diagonal, which start at zero: training starts from
the base model, and the angles between the rows of W are kept. By default the inverse is a short series, as in OFTv2;
solved for, R is the transpose, as in the peft package.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, InputAdapter, WeightAdapter, adapter_dtype
from lightning_peft.core.fields import Count
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.core.targeted import LayerMethod
from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.network.calls import first_input, with_first_input
from lightning_peft.network.hosts import Host
from lightning_peft.network.layouts import EmbeddingLayout


@dataclass(frozen=True, kw_only=True)
class OFT(LayerMethod):
    """Rotations of the inputs of linear, convolution and attention layers.

    Raises:
        ConfigError: a field is out of range, or a layer chosen by name has an input that no block fits.
        NotApplicableError: an embedding is named: it has no features in its input.
    """

    peft: ClassVar[PeftTable | None] = PeftTable(
        type="OFT",
        fields={
            "block_size": "oft_block_size",
            "block_share": "block_share",
            "use_cayley_neumann": "use_cayley_neumann",
            "num_cayley_neumann_terms": "num_cayley_neumann_terms",
        },
        tensors={"oft_R": "oft_R.weight"},
        harmless=("module_dropout", "eps", "init_weights"),  # they act in training, and before it
    )

    block_size: Count = 32
    """Features of one block; a layer gets the divisor of its input's features that is nearest to it."""
    block_share: bool = False
    """One rotation for all blocks of a layer."""
    use_cayley_neumann: bool = True
    """The inverse as a series, which is fast and nearly orthogonal; else solved for."""
    num_cayley_neumann_terms: Count = 5
    """Terms of that series."""

    def build(self, host: Host, shared: Any) -> Adapter:
        if isinstance(host.layout, EmbeddingLayout):
            raise NotApplicableError(f"OFT rotates the features of an input, and '{host.name}' looks up indices.")
        n = host.layout.in_features
        block = min((b for b in range(1, n + 1) if n % b == 0), key=lambda b: abs(b - self.block_size))
        if block == 1:
            raise ConfigError(f"OFT: no block of nearly {self.block_size} fits the {n} inputs of '{host.name}'.")
        linear = host.linear and not host.weight_only
        return OFTInput(self, host, block) if linear else OFTWeight(self, host, block)


class _Rotation(Adapter):
    """The rotations and how they act on features."""

    def __init__(self, method: OFT, host: Host, block: int) -> None:
        super().__init__()
        self.layout, self.block = host.layout, block
        self.terms = method.num_cayley_neumann_terms if method.use_cayley_neumann else 0
        like: dict[str, Any] = {"device": host.weight.device, "dtype": adapter_dtype(host.weight)}
        count = 1 if method.block_share else host.layout.in_features // block
        self.oft_R = nn.Parameter(torch.zeros(count, block * (block - 1) // 2, **like))  # (blocks, b (b - 1) / 2)

    def rotation(self) -> Tensor:
        """The blocks of R, transposed as peft has them: (blocks, b, b)."""
        rows, columns = torch.triu_indices(self.block, self.block, 1, device=self.oft_R.device)
        q = self.oft_R.new_zeros(len(self.oft_R), self.block, self.block)
        q = q.index_put((torch.arange(len(q), device=q.device)[:, None], rows, columns), self.oft_R)
        q = q - q.mT
        one = torch.eye(self.block, device=q.device, dtype=q.dtype)
        if not self.terms:
            solved: Tensor = torch.linalg.solve(one + q, one - q, left=False)
            return solved
        # peft's series: all terms count twice but for the first and, from the fourth on, the last.
        r, power = one + 2 * q * (self.terms > 1), q
        if self.terms > 2:
            for factor in (2, *[2] * (self.terms - 4), 1):
                power = power @ q
                r = r + factor * power
        return r

    def rotated(self, x: Tensor, turn: bool = False) -> Tensor:
        """``x`` (..., in) times R; times its transpose if ``turn``."""
        r = self.rotation().to(x.dtype)
        blocks = x.unflatten(-1, (-1, self.block)).unsqueeze(-2)  # (..., blocks, 1, b)
        y: Tensor = (blocks @ (r.mT if turn else r)).flatten(-3)
        return y

    def turned(self, weight: Tensor) -> Tensor:
        """A weight that does to an input what ``weight`` does to the rotated one."""
        return self.layout.native(self.rotated(self.layout.matrix(weight), turn=True))


class OFTInput(_Rotation, InputAdapter):
    """Rotates the input of a linear layer."""

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return with_first_input(args, kwargs, self.rotated(first_input(args, kwargs)))

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": self.turned(parameters["weight"])}


class OFTWeight(_Rotation, WeightAdapter):
    """Rotates a weight that its host reads itself, and kernels, whose input comes in patches."""

    def __init__(self, method: OFT, host: Host, block: int) -> None:
        super().__init__(method, host, block)
        self.names = (host.parameter,)

    def forward(self, weight: Tensor, name: str) -> Tensor:
        return self.turned(weight)
