"""Some entries of one parameter that train: a slice of a fused bias, scattered entries of a matrix, rows of a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import WeightAdapter
from lightning_peft.core.recipes import Recipe
from lightning_peft.errors import NotApplicableError


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

    def combine(self, sources: Sequence["TunedEntries"], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        combine_entries(self, sources, recipe, parameters[self.names[0]])


def with_entries(weight: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``weight`` with ``values`` in place of its entries ``index`` (see :class:`TunedEntries`)."""
    rows = weight.reshape(-1, *values.shape[1:])
    return rows.index_copy(0, index, values.to(weight.dtype)).view_as(weight)


def entries(weight: Tensor, index: Tensor, *shape: int) -> Tensor:
    """The entries ``index`` of ``weight``, each of ``shape``."""
    return torch.index_select(weight.detach().reshape(-1, *shape), 0, index)


def combine_entries(adapter: Any, sources: Sequence[Any], recipe: Recipe, weight: Tensor) -> None:
    """Give the ``values`` of ``adapter`` what ``recipe`` makes of those of ``sources``, as changes of ``weight``.

    Raises:
        NotApplicableError: they are of different entries.
    """
    if any(not torch.equal(source.index, adapter.index) for source in sources):
        raise NotApplicableError("the adapters tune different entries of it.")
    base = entries(weight, adapter.index, *adapter.values.shape[1:]).to(adapter.values.dtype)
    adapter.values.copy_(base + recipe.mix([source.values - base for source in sources]))
