r"""A low-rank update of a frozen layer whose outputs get norms of their own.

.. math:: y = c \odot (W x + s B A x) + b, \qquad c = m / \|W + s B A\|

with a magnitude m for each output, and the norm of its row of weights a constant to the backward. W + s B A is not
formed for the norm:

.. math:: \|W + s B A\|^2 = \|W\|^2 + 2 s \sum B \odot (W A^T) + s^2 \sum B \odot (B (A A^T))
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.components.low_rank import LowRankFactors, LowRankOutput
from lightning_peft.components.low_rank_rows import ByRow
from lightning_peft.core.adapter import BatchedForm, Reference, adapter_dtype
from lightning_peft.core.adapter_index import AdapterIndex
from lightning_peft.core.recipes import LowRank, Recipe
from lightning_peft.errors import NotApplicableError
from lightning_peft.kernels.dora import plain_rescaled, rescaled_update
from lightning_peft.kernels.low_rank import is_recorded
from lightning_peft.network.hosts import Host
from lightning_peft.network.layouts import Layout, TransposedLayout
from lightning_peft.network.quantized.weights import is_quantized, plain_weight

_BLOCK = 2**20  # entries of a weight in 16 bits that a CPU converts at once: they stay in its cache


class Rescaled(LowRankFactors):
    """The factors and the magnitude, wherever they act."""

    def __init__(self, host: Host, *args: Any) -> None:
        super().__init__(host, *args)
        matrix = host.layout.matrix(plain_weight(host.module, host.parameter).detach())
        self.lora_magnitude_vector = nn.Parameter(squared_norms(matrix, adapter_dtype(matrix)).sqrt())  # (out,)

    def low_rank(self) -> LowRank | None:
        return None

    def combine(self, sources: Sequence[Any], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        raise NotApplicableError(
            "it rescales the weights to norms of its own, which do not add up. Let several act side by side "
            "(activate), or route rows of a batch to them (route)."
        )


class RescaledOutput(Rescaled, LowRankOutput):
    """Adds ``s * B A x`` to the host's output, and rescales all but the bias."""

    uses_base_weight = True

    def __init__(self, host: Host, r: int, scale: float, dropout: float) -> None:
        super().__init__(host, r, scale, dropout)
        self.in_place = host.owns_output
        self._host = Reference(host.module)
        self._bias = host.bias
        self._known: tuple[Any, int, int, Tensor] | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return plain_rescaled(*self._arguments(x, y))

    def forward_(self, x: Tensor, y: Tensor) -> Tensor:
        return rescaled_update(*self._arguments(x, y))

    def _arguments(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        a, b, m = self.lora_A, self.lora_B, self.lora_magnitude_vector
        return self.layout, x, y, a, b, m, self.norm(), self.bias(), self.scale, self.dropout_of(x)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The norm of each output's weights with the update in them, (out,)."""
        weight: Tensor = self._host.module.weight  # type: ignore[assignment]
        if is_quantized(weight):
            weight = plain_weight(self._host.module)
        a, b, s = self.lora_A, self.lora_B, self.scale
        matrix = self.layout.matrix(weight)
        with torch.autocast(weight.device.type, enabled=False):
            squares = self._squares_of(weight)
            cross = _product(a, matrix)  # (r, out)
            changed = squares + (b.T * (2 * s * cross + s * s * (a @ a.T) @ b.T)).sum(0)
        # The sum cannot tell what is smaller from rounding; a row of zeros has no norm at all.
        limits = torch.finfo(changed.dtype)
        return changed.clamp(min=(limits.eps * squares).clamp(min=limits.tiny)).sqrt()

    def bias(self) -> Tensor | None:
        """The host's bias, which keeps its size."""
        return getattr(self._host.module, self._bias) if self._bias else None

    def _squares_of(self, weight: Tensor) -> Tensor:
        """``‖W‖²``, computed anew only where the weight has been exchanged or written to."""
        dtype, matrix = self.lora_A.dtype, self.layout.matrix(weight)
        if is_recorded() or weight.is_inference() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return squared_norms(matrix, dtype)
        if self._known is not None:
            known, pointer, version, squares = self._known
            if known() is weight and pointer == weight.data_ptr() and version == weight._version:
                return squares
        squares = squared_norms(matrix, dtype)
        self._known = weakref.ref(weight), weight.data_ptr(), weight._version, squares
        return squares

    # What writes through ``.data`` leaves no trace on a tensor: look again whenever the model is cast or changes mode.

    def train(self, mode: bool = True) -> "RescaledOutput":
        self._known = None
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> "RescaledOutput":
        self._known = None
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": None}  # a copy has weights of its own

    @classmethod
    def batched(cls, adapters: Sequence["RescaledOutput"]) -> BatchedForm | None:
        alike = all(a.dropout == adapters[0].dropout for a in adapters)
        linear = all(type(a.layout) in (Layout, TransposedLayout) for a in adapters)
        return _RescaledByRow(adapters) if alike and linear else None


class _RescaledByRow:
    """Several adapters of one host at once, each on its rows."""

    def __init__(self, adapters: Sequence[RescaledOutput]) -> None:
        self.adapters, self.update = adapters, ByRow(adapters)

    def __call__(self, x: Tensor, y: Tensor, index: AdapterIndex) -> Tensor:
        z, own = self.update(x, y, index), [a.lora_magnitude_vector / a.norm() for a in self.adapters]
        c = torch.stack([*own, torch.ones_like(own[0])]).index_select(0, index.rows)  # (rows, out)
        c, bias = c.view(len(c), *[1] * (z.dim() - 2), -1), self.adapters[0].bias()
        out = z * c if bias is None else z * c + (1 - c) * bias
        return out.to(z.dtype)


def squared_norms(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The square of the norm of each row, added up in ``dtype``."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=dtype)
    return norm.square()


def _product(a: Tensor, matrix: Tensor) -> Tensor:
    """``A Wᵀ`` (r, out) in the dtype of ``a``, without a whole copy of the matrix in that dtype.

    In a graph that torch records, a matrix in 16 bits is multiplied as it is, and the product rounded to 16 bits.
    """
    if matrix.dtype == a.dtype:
        return a @ matrix.T
    if is_recorded():
        return (a.to(matrix.dtype) @ matrix.T).to(a.dtype)
    rows = max(1, (_BLOCK if matrix.is_cpu else 16 * _BLOCK) // matrix.shape[1])
    return torch.cat([a @ block.to(a.dtype).T for block in matrix.split(rows)], 1)
