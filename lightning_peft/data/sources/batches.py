"""From rows of token ids to batches for language models. At module level and without a tokenizer: they pickle."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

HIDDEN = -100  # the label of a token that is not learned, as torch's and transformers' losses have it


def pad(rows: list[Tensor], value: int, side: str = "right") -> Tensor:
    """Return ``rows``, each (tokens,), filled up with ``value`` at ``side``: (rows, longest)."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def pad_ids(ids: list[Tensor], pad_token_id: int, side: str = "right") -> dict[str, Any]:
    """Return ``input_ids`` and ``attention_mask`` (rows, longest) of rows of token ids, each (tokens,)."""
    # The mask is made from the lengths: the id that pads may be the end token, which is a part of texts.
    mask = [torch.ones_like(row) for row in ids]
    return {"input_ids": pad(ids, pad_token_id, side), "attention_mask": pad(mask, 0, side)}


@dataclass(frozen=True, kw_only=True)
class LanguageModelCollator:
    """Pad rows on the right to the longest of the batch.

    Attributes:
        pad_token_id: What ``input_ids`` are filled up with.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` (rows, longest); all is learned in rows without."""
        ids = [torch.as_tensor(row["input_ids"]).long() for row in rows]
        labels = [torch.as_tensor(row.get("labels", row["input_ids"])).long() for row in rows]
        return pad_ids(ids, self.pad_token_id) | {"labels": pad(labels, HIDDEN)}


@dataclass(frozen=True, kw_only=True)
class PromptCollator:
    """Take the prompts of rows, padded so that the generated text follows each directly.

    Attributes:
        pad_token_id: What ``input_ids`` are filled up with.
        padding_side: ``"left"``, or ``"right"`` for the prompts of an encoder.
    """

    pad_token_id: int
    padding_side: str = "left"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return ``input_ids`` and ``attention_mask``, and ``prompt`` (and ``completion``), lists of str."""
        ids = [torch.tensor(row["input_ids"][: row["prompt_length"]]) for row in rows]
        batch = pad_ids(ids, self.pad_token_id, self.padding_side)
        return batch | {key: [row[key] for row in rows] for key in ("prompt", "completion") if key in rows[0]}


@dataclass(frozen=True, kw_only=True)
class PackingCollator:
    """Lay the rows of each block one behind the other.

    Attributes:
        pad_token_id: What ``input_ids`` of shorter blocks are filled up with.
    """

    pad_token_id: int

    def __call__(self, blocks: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``position_ids`` and ``labels`` (blocks, longest)."""
        ids, positions, labels = map(list, zip(*map(_lay, blocks), strict=True))
        padded = pad(positions, -1)
        # The padding counts from 0 as well: to the model it is one more row.
        beginning = (padded == -1).long().cumsum(-1) - 1
        return {
            "input_ids": pad(ids, self.pad_token_id),
            "position_ids": torch.where(padded == -1, beginning, padded),
            "labels": pad(labels, HIDDEN),
        }


def _lay(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([token for row in rows for token in row["input_ids"]])
    positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])
    # A row's first token is predicted from nothing; in a block it would be from the row before.
    labels = torch.tensor([label for row in rows for label in (HIDDEN, *row.get("labels", row["input_ids"])[1:])])
    return ids, positions, labels
