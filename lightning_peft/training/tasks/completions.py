"""Texts that a language model has gone on with, as rows and on the screen."""

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.training.tasks.token_loss import IGNORED


class Completion(TypedDict):
    """What ``predict`` gives for one text."""

    prompt: str
    completion: str
    """What the model has written."""
    expected: NotRequired[str]
    """What it should have written, if the data says so."""


def completion_table(rows: list[Completion], title: str = "Samples") -> Table:
    """Lay out what was written: prompts, what was expected, and what was generated."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("prompt", "expected", "generated"):
        table.add_column(column, overflow="fold")
    for row in rows:
        # As Text: square brackets are no markup there.
        table.add_row(*(Text(text) for text in (row["prompt"], row.get("expected", ""), row["completion"])))
    return table


def padded(rows: Sequence[Tensor], value: int = 0, side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """``rows`` of token ids, each (tokens,), filled up with ``value``, and their mask: both (rows, longest)."""
    ids, mask = (
        pad_sequence(list(parts), batch_first=True, padding_value=filling, padding_side=side)
        for parts, filling in ((rows, value), ([torch.ones_like(row) for row in rows], 0))
    )
    return ids, mask


def labelled_span(labels: Tensor) -> tuple[int, int]:
    """Where the first run of labels in ``labels`` (tokens,) begins and ends."""
    known = (labels != IGNORED).tolist()
    start = known.index(True) if True in known else len(known)
    return start, next((i for i in range(start, len(known)) if not known[i]), len(known))
