"""Some entries of one parameter that train: a slice of a fused bias, scattered entries of a matrix, rows of a table."""

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import WeightAdapter


class TunedEntries(WeightAdapter):
    """Trainable entries of one parameter, read in place of the base's own. The others are the base's."""

    index: Tensor

    def __init__(self, name: str, values: nn.Parameter, index: Tensor) -> None:
        """Put ``values`` in place of the entries ``index`` of the parameter ``name``.

        Args:
            name: path of the parameter from its host.
            values: (k, ...) with the shape of a row, or (k,) where ``index`` counts single entries.
            index: (k,) positions along the first dimension of the parameter, seen as (n, *values.shape[1:]).
        """
        super().__init__()
        self.names = (name,)
        self.values = values
        self.register_buffer("index", index)

    def forward(self, weight: Tensor, name: str) -> Tensor:
        return with_entries(weight, self.index, self.values)


def with_entries(weight: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``weight`` with ``values`` in place of its entries ``index`` (see :class:`TunedEntries`)."""
    rows = weight.reshape(-1, *values.shape[1:])
    return rows.index_copy(0, index, values.to(weight.dtype)).view_as(weight)


def entries(weight: Tensor, index: Tensor, *shape: int) -> Tensor:
    """The entries ``index`` of ``weight``, each of ``shape``."""
    return torch.index_select(weight.detach().reshape(-1, *shape), 0, index)
