"""Instructions and conversations with completions: from files or the hub to batches for a language model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.data.language_model import LanguageModelData
from lightning_peft.data.module import require_choice
from lightning_peft.data.sources.batches import PromptCollator
from lightning_peft.data.sources.chat import Chat
from lightning_peft.data.sources.conversations import FORMATS
from lightning_peft.data.sources.loading import Source
from lightning_peft.data.sources.preparing import TRAIN_ON, PrepareInstructions
from lightning_peft.errors import ConfigError, DataError


class InstructionData(LanguageModelData):
    """Teach a language model to complete prompts: Alpaca, ShareGPT, messages, or prompts with completions.

    Every row becomes a conversation (see :mod:`~lightning_peft.data.sources.conversations`), which the tokenizer's chat
    template renders. The labels hide all but the completions, each with the token that ends it. Where the tokenizer has
    no template there is a plain one: each turn on a line, the completion after the last line break, then the end token;
    a prompt and a completion that are texts join as they are.

    A batch is a dict of tensors, ``input_ids``, ``attention_mask`` and ``labels`` (rows, longest), padded on the right;
    labels are -100 where nothing is learned, and not shifted. With ``packing``, a training batch holds blocks of whole
    rows: ``input_ids``, ``position_ids``, which begin at 0 with each row, and ``labels``. It has no ``attention_mask``:
    transformers keeps rows apart by their positions, provided that the model is called with ``use_cache=False`` and is
    one of those that do (see :mod:`lightning_peft.data.sources.packing`). With ``seq2seq``, ``input_ids`` and
    ``attention_mask`` are the prompt's, and ``labels`` (rows, longest completion) the last completion's.

    In predict a batch has the prompts alone, padded on the left: ``input_ids``, ``attention_mask``, and ``prompt`` (the
    last user turn) and ``completion`` (empty where the row has none), lists of str. Predict reads ``predict_file``
    (whose rows need no completion), else the test rows.

    A row without a completion, with turns in wrong order, with anything but text, or whose prompt leaves no room for
    a completion is a bad row: it is left out and reported with its number, or stops the run. A row that is longer than
    ``max_length`` is cut at its end, and that is reported too. :attr:`reports` has all numbers.

    Splits, and the order of the training batches, are as in :class:`~lightning_peft.data.TextClassificationData`.

    Args:
        tokenizer: Tokenizer of the model: a local folder or a name on the hub.
        path: A data set on the hub, a local folder, or one csv, tsv, json, jsonl or parquet file with all rows.
        name: Configuration of a hub data set.
        train_file: File with the training rows, in place of ``path``.
        validation_file: File with the validation rows.
        test_file: File with the test rows.
        predict_file: File with the prompts to complete.
        format: ``"messages"``, ``"prompt-completion"``, ``"alpaca"``, or ``"auto"``: by the columns of each row.
        prompt_column: Column of the prompt of ``"prompt-completion"``.
        completion_column: Column of its completion.
        system_prompt: A system turn for rows that have none.
        chat_template: In place of the tokenizer's: a Jinja template, a file of that kind (.jinja), or ``"plain"``.
        train_on: What is learned: ``"completions"``, the ``"last"`` completion of a conversation, or ``"everything"``.
        seq2seq: Whether the model is an encoder-decoder.
        packing: Whether short training rows share a block of up to ``max_length`` tokens.
        on_bad_row: ``"skip"``, or ``"error"`` to stop.
        validation_split: If there are no validation rows: how many of the training rows to take, as a number of rows
            (int) or a share in (0, 1) (float); 0 for none.
        test_split: The same for test rows.
        split_seed: Seed of these two and of the order of the training batches.
        max_length: Rows are cut to this many tokens, special ones included (with ``seq2seq``: prompts and completions).
        batch_size: Rows of a training batch (on each device); with ``packing``, blocks.
        eval_batch_size: Rows of a batch in validate, test and predict; by default ``batch_size``.
        bucket: Whether training batches hold rows of similar length, which saves padding; of no use with ``packing``.
        num_workers: Processes that prepare batches; 0 for none besides the main one.

    Raises:
        ConfigError: If an argument has a value it cannot have.
        DataError: In ``prepare_data`` and ``setup``: if the data is not as described.
    """

    def __init__(
        self,
        tokenizer: str,
        path: str | None = None,
        name: str | None = None,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        format: str = "auto",
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        system_prompt: str | None = None,
        chat_template: str | None = None,
        train_on: str = "completions",
        seq2seq: bool = False,
        packing: bool = False,
        on_bad_row: str = "skip",
        validation_split: int | float = 0.1,
        test_split: int | float = 0.1,
        split_seed: int = 0,
        max_length: int = 512,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        bucket: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            path=path,
            name=name,
            files={"train": train_file, "validation": validation_file, "test": test_file, "predict": predict_file},
            validation_split=validation_split,
            test_split=test_split,
            split_seed=split_seed,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            bucket=bucket,
            num_workers=num_workers,
            packing=packing,
            on_bad_row=on_bad_row,
        )
        require_choice(FORMATS, format=format)
        require_choice(TRAIN_ON, train_on=train_on)
        if seq2seq and (packing or train_on == "everything"):
            option = "packing=True" if packing else "train_on='everything'"
            raise ConfigError(
                f"{option} is for causal language models: an encoder-decoder (seq2seq=True) cannot do it."
            )
        self.reading = {
            "layout": format,
            "prompt_column": prompt_column,
            "completion_column": completion_column,
            "system_prompt": system_prompt,
        }
        self.chat_template = chat_template
        self.train_on = train_on
        self.seq2seq = seq2seq

    def _preparing(self, split: str, source: Source, tokenizer: Any, fresh: str) -> PrepareInstructions:
        return PrepareInstructions(
            Chat(tokenizer, _read_template(self.chat_template)),
            fresh,
            first=int(source.lines),
            reading=self.reading,
            train_on=self.train_on,
            max_length=self.max_length,
            seq2seq=self.seq2seq,
            prompts=split == "predict",
        )

    def _batching(self, split: str, predict: bool) -> tuple[Any, Callable[[list[Any]], dict[str, Any]]]:
        if not predict:
            return super()._batching(split, predict)
        rows = self.splits[split]
        # Of a conversation that was cut, the last prompt may be gone.
        whole = [i for i, length in enumerate(rows["prompt_length"][:]) if length <= self.max_length]
        if len(whole) < len(rows):
            rank_zero_warn(f"predict: {len(rows) - len(whole)} {split} rows are left out: their prompt was cut.")
            rows = rows.select(whole)
        side = "right" if self.seq2seq else "left"
        columns = ["input_ids", "prompt_length", "prompt", "completion"]
        return rows.select_columns(columns), PromptCollator(pad_token_id=self._pad_token_id, padding_side=side)


def _read_template(template: str | None) -> str | None:
    if template is None or not template.endswith((".jinja", ".jinja2")):
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template: cannot read {template!r}: {error}") from error
