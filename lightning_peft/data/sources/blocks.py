"""Documents joined to one stream of tokens and cut in blocks of equal length."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


class TokenBlocks:
    """A data set of the blocks; nothing is copied, a block is read where ``datasets`` keeps the tokens.

    Args:
        rows: Documents with ``input_ids``; without a selection of rows, which their storage knows nothing of.
        size: Tokens of a block; the last one may have fewer.
        chosen: The numbers of the blocks that are in the set, by default all.
    """

    def __init__(self, rows: "Dataset", size: int, chosen: Sequence[int] | None = None) -> None:
        self.rows = rows
        self.size = size
        import pyarrow as pa  # type: ignore[import-untyped]

        documents = rows.data.column("input_ids").chunks
        self._tokens: Any = pa.chunked_array([chunk.flatten() for chunk in documents], type=pa.int32())
        total = -(-len(self._tokens) // size)
        if total * size - len(self._tokens) == size - 1:  # a single token has nothing to predict
            total -= 1
        self.chosen = range(total) if chosen is None else chosen

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokens": None}  # worker processes find them in the cache file again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["rows"], state["size"], state["chosen"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self.chosen[index] * self.size
        return {"input_ids": self._tokens.slice(start, self.size).to_numpy().copy()}

    def select(self, indices: Sequence[int]) -> "TokenBlocks":
        """Return a set of some of the blocks."""
        return TokenBlocks(self.rows, self.size, [self.chosen[index] for index in indices])
