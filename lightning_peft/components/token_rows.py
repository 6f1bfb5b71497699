"""Some rows of a table of tokens that train, without a copy of the whole table in every forward pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.components.entries import TunedEntries, combine_entries, entries, with_entries
from lightning_peft.components.tuned import trainable_copy
from lightning_peft.core.adapter import Adapter, OutputAdapter
from lightning_peft.core.method import Placement
from lightning_peft.core.recipes import Recipe
from lightning_peft.errors import NotApplicableError, TargetError
from lightning_peft.network.parameters import BaseParameter, find_parameters
from lightning_peft.network.pretrained import input_embeddings


def find_table(model: nn.Module, named: Sequence[BaseParameter]) -> BaseParameter:
    """The table of the input tokens, of those ``named`` if there are any: a transformers model's own, or the only one.

    Raises:
        NotApplicableError: there is none.
        TargetError: there are several.
    """
    every = [p for p in find_parameters(model) if isinstance(p.module, nn.Embedding)]
    inputs = {id(module.weight) for module in input_embeddings(model)}
    chosen = {id(p.tensor) for p in named} & {id(p.tensor) for p in every} or {id(p.tensor) for p in every}
    tables = {id(p.tensor): p for p in reversed(every) if id(p.tensor) in (chosen & inputs or chosen)}
    if not tables:
        raise NotApplicableError(f"token_ids: {type(model).__name__} has no embedding whose rows could train.")
    if len(tables) > 1:
        names = ", ".join(repr(p.path) for p in reversed(tables.values()))
        raise TargetError(f"token_ids: the tokens could belong to {names}: name one of them in target_modules.")
    return next(iter(tables.values()))


def tune_rows(places: Sequence[BaseParameter], token_ids: Sequence[int]) -> list[Placement]:
    """One adapter for each module that reads the table; they share the rows.

    Args:
        places: the modules that read one and the same table.
        token_ids: rows to train.
    """
    table, tokens = places[0].tensor, sorted(token_ids)
    index = torch.tensor(tokens, device=table.device)
    values = trainable_copy(entries(table, index, *table.shape[1:]), places[0].full_name)
    return [
        Placement(place.path, _adapter(place, values, index, tokens), place.name.replace(".", "_")) for place in places
    ]


def _adapter(place: BaseParameter, values: nn.Parameter, index: Tensor, tokens: list[int]) -> Adapter:
    module, forward = place.module, type(place.module).forward
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        if module.max_norm is None and not module.scale_grad_by_freq:
            padding = module.padding_idx
            return TokenRows(values, index, tokens.index(padding) if padding in tokens else None)
    elif isinstance(module, nn.Linear) and forward is nn.Linear.forward and module.bias is None:
        return TokenLogits(values, index)
    return TunedEntries(place.name, values, index)  # whatever the module does with its table, it does with these rows


class TokenRows(OutputAdapter):
    """Puts trained rows in place of what an embedding has looked up for their tokens."""

    index: Tensor

    def __init__(self, values: nn.Parameter, index: Tensor, padding: int | None) -> None:
        """Take ``values`` (k, features), the rows of the tokens ``index`` (k,), which ascend.

        ``padding`` is the place of the padding token among them, whose row torch gives no gradient.
        """
        super().__init__()
        self.values, self.padding = values, padding
        self.register_buffer("index", index)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        tokens = x.to(self.index.dtype).contiguous()  # else searchsorted warns
        place = torch.searchsorted(self.index, tokens).clamp(max=len(self.index) - 1)
        rows = F.embedding(place, self.values, self.padding).to(y.dtype)
        return torch.where((self.index[place] == tokens).unsqueeze(-1), rows, y)

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": with_entries(parameters["weight"], self.index, self.values)}

    def combine(self, sources: Sequence[Any], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        combine_entries(self, sources, recipe, parameters["weight"])


class TokenLogits(OutputAdapter):
    """Replaces the scores of some tokens in the output of a linear layer that is tied to the table."""

    index: Tensor

    def __init__(self, values: nn.Parameter, index: Tensor) -> None:
        """Take ``values`` (k, features), the rows of the tokens ``index`` (k,)."""
        super().__init__()
        self.values = values
        self.register_buffer("index", index)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        # In place: y is the layer's own, fresh, and the largest tensor of a language model.
        return y.index_copy_(-1, self.index, F.linear(x, self.values.to(x.dtype)).to(y.dtype))

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": with_entries(parameters["weight"], self.index, self.values)}

    def combine(self, sources: Sequence[Any], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        combine_entries(self, sources, recipe, parameters["weight"])
