"""Plain text: from files or the hub to batches for a causal language model that learns every token."""

from collections.abc import Sequence
from typing import Any

from lightning_peft.data.language_model import LanguageModelData
from lightning_peft.data.module import Batching
from lightning_peft.data.sources.batches import LanguageModelCollator
from lightning_peft.data.sources.blocks import TokenBlocks
from lightning_peft.data.sources.loading import Source, require_columns
from lightning_peft.data.sources.preparing import PrepareTexts
from lightning_peft.data.sources.records import has_columns
from lightning_peft.errors import ConfigError, DataError


class TextData(LanguageModelData):
    """Teach a language model to write like given texts.

    Each text is ended by the end token. With ``join``, all of a split are joined to one stream and cut in blocks of
    ``max_length`` tokens: nothing is padding but the end of the last block, a long text goes on in the next block, and
    a text can see the end of the one before it. Without, each text is a row by itself, and cut if it is longer.

    A batch is a dict of tensors, ``input_ids``, ``attention_mask`` and ``labels`` (rows, longest), padded on the right;
    labels are the ids, not shifted, and -100 in the padding. With ``packing``, which needs ``join=False``, a training
    batch is as in :class:`~lightning_peft.data.InstructionData`.

    A row whose text is empty, or no text, is a bad row: it is left out and reported with its number, or stops the run.
    :attr:`reports` has all numbers.

    Splits, and the order of the training batches, are as in :class:`~lightning_peft.data.TextClassificationData`; with
    ``join`` it is blocks that are divided and shuffled. There is nothing to predict.

    Args:
        args: ``tokenizer``, ``path``, … of :class:`~lightning_peft.data.module.RowsData`, by position.
        text_column: Column of the text.
        join: True if texts are joined, with the end token between them, and cut in blocks.
        kwargs: Options of ``RowsData``, but for ``predict_file``, and of
            :class:`~lightning_peft.data.language_model.LanguageModelData`.

    Raises:
        ConfigError: If an argument has a value it cannot have.
        DataError: In ``prepare_data`` and ``setup``: if the data is not as described.
    """

    def __init__(self, *args: Any, text_column: str = "text", join: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, predict_file=None, **kwargs)  # given here, it is no option of the command
        if join and self.packing:
            raise ConfigError(
                "packing=True keeps texts whole and apart, join=True joins and cuts them: set join=False."
            )
        if self.max_length < 2:
            raise ConfigError(
                f"max_length={self.max_length!r} must be at least 2: a token is predicted from one before it."
            )
        self.text_column = text_column
        self.join = join

    def _preparing(self, split: str, source: Source, tokenizer: Any, fresh: str) -> PrepareTexts:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"tokenizer {self.tokenizer!r} has no end-of-text token (eos_token) to end texts with.")
        if has_columns(source):
            require_columns(source, {"text_column": self.text_column})
        length = None if self.join else self.max_length
        first = int(source.lines)
        return PrepareTexts(tokenizer, fresh, first=first, text_column=self.text_column, max_length=length)

    def _keep(self, examples: Any) -> Any:
        # A bad row has no tokens, so nothing of it gets into the stream.
        return TokenBlocks(examples, self.max_length) if self.join else super()._keep(examples)

    def _divide_train(self, train: Any, there: Sequence[str], origin: str) -> dict[str, Any]:
        if not self.join:
            return super()._divide_train(train, there, origin)
        parts = self._divide(len(train), there, f"{origin}, in blocks of {self.max_length} tokens,")
        return {split: train.select(blocks) for split, blocks in parts.items()}

    def _batching(self, split: str, predict: bool) -> Batching:
        if self.join:
            return self.splits[split], LanguageModelCollator(pad_token_id=self._pad_token_id)
        return super()._batching(split, predict)

    def _lengths(self) -> Sequence[int] | None:
        return None if self.join else super()._lengths()

    def _require_stage(self, stage: str) -> str:
        if stage == "predict":
            raise DataError("predict: texts have nothing to predict. For prompts take InstructionData.")
        return super()._require_stage(stage)
