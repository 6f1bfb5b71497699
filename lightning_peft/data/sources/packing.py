"""Short rows in full blocks, each row by itself: pure functions.

A packed batch has no ``attention_mask``. ``position_ids`` begin at 0 with each row, and from that the models of
transformers derive that a row attends to itself alone, if they are called with ``use_cache=False``: with a mask, which
keeps a sliding window right too, or with row lengths in flash attention (there for one block in a batch only). Not all
models do (Falcon, OPT and gpt-oss do not).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put rows into as few blocks as best-fit decreasing finds: longest first, each where the least room is left.

    Args:
        lengths: Length of each row, at most ``capacity``.
        capacity: Length of a block.

    Returns:
        The rows of each block, by number; every row is in one block. It depends on the arguments alone.
    """
    blocks: list[list[int]] = []
    room: list[int] = []  # what blocks have left, ascending, without repetition
    having: dict[int, list[int]] = {}  # blocks by what they have left
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = bisect_left(room, lengths[row])
        if place == len(room):
            block, left = len(blocks), capacity
            blocks.append([])
        else:
            left = room[place]
            block = having[left].pop()
            if not having[left]:
                del having[left], room[place]
        blocks[block].append(row)
        left -= lengths[row]
        if left not in having:
            having[left] = []
            insort(room, left)
        having[left].append(block)
    return blocks


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Return the share of padding in batches of rows in the given order."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


@dataclass(frozen=True)
class PackedRows:
    """A data set of blocks: an item is the list of the rows of a block.

    Attributes:
        rows: The rows.
        blocks: The numbers of the rows of each block.
    """

    rows: Any
    blocks: list[list[int]]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.rows[row] for row in self.blocks[index]]
