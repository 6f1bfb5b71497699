"""Some entries of one parameter that train: a slice of a fused bias, scattered entries of a matrix, rows of a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_peft.components.tuned import Copies, TunedParameters, trainable_copy
from lightning_peft.core.adapter import WeightAdapter
from lightning_peft.core.method import Placement
from lightning_peft.core.recipes import Recipe
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.parameters import BaseParameter, count


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
    """Combine the ``values`` of ``sources``, as changes of ``weight``, into the ``values`` of ``adapter``.

    Raises:
        NotApplicableError: they are of different entries.
    """
    if any(not torch.equal(source.index, adapter.index) for source in sources):
        raise NotApplicableError("the adapters tune different entries of it.")
    base = entries(weight, adapter.index, *adapter.values.shape[1:]).to(adapter.values.dtype)
    adapter.values.copy_(base + recipe.mix([source.values - base for source in sources]))


def tune(chosen: Sequence[BaseParameter]) -> list[Placement]:
    """One adapter for each host that reads parameters of ``chosen``; tied ones stay tied.

    Raises:
        NotApplicableError: one of them is quantized, complex, not there yet, or part of a parametrization.
    """
    copies: Copies = {}
    hosts: dict[str, list[BaseParameter]] = {}
    for p in chosen:
        hosts.setdefault(p.path, []).append(p)
    placements: list[Placement] = []
    for path, own in hosts.items():
        if isinstance(own[0].module, ParametrizationList):
            raise NotApplicableError(
                f"'{own[0].full_name}' only goes into a weight that is computed (a parametrization: weight_norm). "
                "Remove the parametrization first, or leave it out: exclude_modules=['parametrizations']."
            )
        # A fused bias belongs to several layers, of which some may be left out.
        whole = [p.name for p in own if p.part is None]
        parts: dict[str, list[BaseParameter]] = {}
        for p in own:
            if p.part is not None:
                parts.setdefault(p.name, []).append(p)
        for name, pieces in parts.items():
            index = torch.cat([torch.arange(*p.part) for p in pieces if p.part]).to(pieces[0].tensor.device)
            # All of its layers were chosen: a plain copy is cheaper than scattered entries.
            if count(pieces) == pieces[0].tensor.numel():
                whole.append(name)
            else:
                values = trainable_copy(entries(pieces[0].tensor, index), name)
                placements.append(Placement(path, TunedEntries(name, values, index), name.replace(".", "_")))
        if whole:
            placements.append(Placement(path, TunedParameters(own[0].module, whole, copies)))
    return placements
