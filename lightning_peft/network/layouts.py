"""How a layer's weight turns into a matrix (out, in) and back, and how the two halves of a low-rank product act."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A weight stored as (out, in), as ``nn.Linear`` does."""

    out_features: int
    in_features: int

    def matrix(self, weight: Tensor) -> Tensor:
        """View the layer's own ``weight`` as (out, in)."""
        return weight

    def native(self, matrix: Tensor) -> Tensor:
        """Give ``matrix`` (out, in) the shape of the layer's own weight."""
        return matrix

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Apply ``a`` (r, in) to the layer's input: (..., in) -> (..., r)."""
        return F.linear(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Apply ``b`` (out, r) to what :meth:`down` made: (..., r) -> (..., out)."""
        return F.linear(h, b)

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Apply ``matrix`` (out, in) to the layer's input, as the layer applies its weight: (..., in) -> (..., out)."""
        return F.linear(x, matrix)

    def channels(self, vector: Tensor) -> Tensor:
        """Give ``vector`` (out,) the shape in which it multiplies the channels of the layer's output (or input)."""
        return vector


@dataclass(frozen=True)
class TransposedLayout(Layout):
    """A weight stored as (in, out): the ``Conv1D`` of GPT-2."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def native(self, matrix: Tensor) -> Tensor:
        return matrix.T


@dataclass(frozen=True)
class EmbeddingLayout(TransposedLayout):
    """A table (entries, features), seen as (features, entries): its input is an index, that is, a one-hot vector."""

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False
    scale: float = 1.0
    """What the layer multiplies with what it has looked up (Gemma, BART)."""

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        y = F.linear(h, b)
        return y if self.scale == 1 else y * self.scale

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        y = self.down(x, matrix)
        return y if self.scale == 1 else y * self.scale


@dataclass(frozen=True)
class ConvLayout(Layout):
    """A kernel (out, in / groups, *k), seen as (out, in / groups · prod k): with groups, all groups share ``a``."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    border: tuple[int, ...] = ()  # of torch.nn.functional.pad, where padding_mode is not "zeros"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def native(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], -1, *self.kernel)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        kernel = self.native(a)
        if self.groups > 1:
            kernel = kernel.repeat(self.groups, *[1] * (kernel.dim() - 1))  # (groups · r, in / groups, *k)
        return self._own(x, kernel)

    def apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self._own(x, self.native(matrix))

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return self._convolve(h, b.reshape(*b.shape, *[1] * len(self.kernel)), groups=self.groups)

    def channels(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * len(self.kernel))

    def _own(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Convolve as the layer does, with another kernel."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.border, mode=self.padding_mode), 0  # type: ignore[assignment]
        return self._convolve(x, kernel, None, self.stride, padding, self.dilation, self.groups)

    def _convolve(self, *args: Any, **kwargs: Any) -> Tensor:
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        out: Tensor = convolve(*args, **kwargs)
        return out
