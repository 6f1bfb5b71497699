"""What the data modules for language models share: bad rows and their report, and packing."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_peft.data.module import Batching, RowsData, require_choice
from lightning_peft.data.sources.batches import LanguageModelCollator, PackingCollator
from lightning_peft.data.sources.loading import Source
from lightning_peft.data.sources.packing import PackedRows, pack, padding_share
from lightning_peft.data.sources.preparing import PrepareInstructions, PrepareTexts, prepare
from lightning_peft.data.sources.records import RowReport, read_records
from lightning_peft.data.sources.tokenizing import find_pad_token_id, load_tokenizer


class LanguageModelData(RowsData):
    """Base of the data modules for language models. A subclass says in :meth:`_preparing` what becomes of a row.

    Args:
        args: ``tokenizer``, ``path``, … of :class:`~lightning_peft.data.module.RowsData`, by position.
        packing: True if short training rows share a block of up to ``max_length`` tokens, without seeing each other.
        on_bad_row: ``"skip"``, or ``"error"`` to stop.
        max_length: Rows are cut to this many tokens, special ones included; blocks have as many.
        batch_size: Rows of a training batch (on each device); with ``packing`` or ``join``, blocks.
        kwargs: Options of ``RowsData``.

    Attributes:
        reports: What became of the rows of each file or split, once they are loaded.
    """

    def __init__(
        self,
        *args: Any,
        packing: bool = False,
        on_bad_row: str = "skip",
        max_length: int = 512,
        batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, max_length=max_length, batch_size=batch_size, **kwargs)
        require_choice(("skip", "error"), on_bad_row=on_bad_row)
        self.packing = packing
        self.on_bad_row = on_bad_row
        self.reports: dict[str, RowReport] = {}
        self._blocks: list[list[int]] = []
        self._pad_token_id = 0

    @abstractmethod
    def _preparing(self, split: str, source: Source, tokenizer: Any, fresh: str) -> PrepareInstructions | PrepareTexts:
        """Return the function to map over the rows; ``fresh`` is the digest of the tokenizer as it was loaded."""

    def _load(self) -> dict[str, Any]:
        tokenizer, fresh = load_tokenizer(self.tokenizer, self.max_length)
        splits, reports = {}, {}
        # Read row by row: Arrow would refuse a whole file for one row of another type.
        for split, source in self._sources(read_records).items():
            function = self._preparing(split, source, tokenizer, fresh)
            examples, report = prepare(source, function, f"Tokenizing {split}")
            report.require_good(all_good=self.on_bad_row == "error")
            splits[split], reports[split] = self._keep(examples), report
        if "train" in splits:
            splits |= self._divide_train(splits["train"], list(splits), reports["train"].origin)
        for report in reports.values():
            if text := report.describe(self.max_length):
                rank_zero_warn(text)
        if self.packing and "train" in splits:
            self._blocks = self._pack(splits["train"]["length"][:])
        self.reports = reports
        self._pad_token_id = find_pad_token_id(tokenizer)
        return splits

    def _keep(self, examples: Any) -> Any:
        """Leave out the bad rows."""
        good = [row for row, reason in enumerate(examples["reason"][:]) if not reason]
        kept = examples if len(good) == len(examples) else examples.select(good)
        return kept.remove_columns(["reason", "message"])

    def _divide_train(self, train: Any, there: Sequence[str], origin: str) -> dict[str, Any]:
        """Divide by row, not by example: the several examples of one conversation stay together."""
        numbers = train["number"][:]
        rows = list(dict.fromkeys(numbers))
        parts = {split: {rows[i] for i in part} for split, part in self._divide(len(rows), there, origin).items()}
        return {
            split: train.select([i for i, number in enumerate(numbers) if number in part])
            for split, part in parts.items()
        }

    def _pack(self, lengths: list[int]) -> list[list[int]]:
        blocks = pack(lengths, self.max_length)
        packed = padding_share([sum(lengths[row] for row in block) for block in blocks], self.batch_size)
        as_many = round(self.batch_size * len(lengths) / len(blocks))
        alone = padding_share(lengths, as_many)
        rank_zero_info(
            f"packing: {len(lengths)} training rows in {len(blocks)} blocks of up to {self.max_length} tokens; "
            f"{packed:.1%} of a batch is padding, of one of {as_many} rows that are not packed {alone:.1%}."
        )
        return blocks

    def _batching(self, split: str, predict: bool) -> Batching:
        rows = self.splits[split]
        rows = rows.select_columns([column for column in ("input_ids", "labels") if column in rows.column_names])
        if self.packing and split == "train":
            return PackedRows(rows, self._blocks), PackingCollator(pad_token_id=self._pad_token_id)
        return rows, LanguageModelCollator(pad_token_id=self._pad_token_id)

    def _lengths(self) -> Sequence[int] | None:
        return None if self.packing else super()._lengths()
