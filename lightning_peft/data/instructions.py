"""Instructions and conversations with completions: from files or the hub to batches for a language model."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.data.language_model import LanguageModelData
from lightning_peft.data.module import Batching, require_choice
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
        args: ``tokenizer``, ``path``, … of :class:`~lightning_peft.data.module.RowsData`, by position.
        format: ``"messages"``, ``"prompt-completion"``, ``"alpaca"``, or ``"auto"``: by the columns of each row.
        prompt_column: Column of the prompt of ``"prompt-completion"``.
        completion_column: Column of its completion.
        system_prompt: A system turn for rows that have none.
        chat_template: In place of the tokenizer's: a Jinja template, a file of that kind (.jinja), or ``"plain"``.
        train_on: Tokens to learn: ``"completions"``, the ``"last"`` completion of a conversation, or ``"everything"``.
        seq2seq: True if the model is an encoder-decoder; prompts and completions are then cut to ``max_length`` each.
        kwargs: Options of ``RowsData`` and :class:`~lightning_peft.data.language_model.LanguageModelData`.

    Raises:
        ConfigError: If an argument has a value it cannot have.
        DataError: In ``prepare_data`` and ``setup``: if the data is not as described.
    """

    def __init__(
        self,
        *args: Any,
        format: str = "auto",
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        system_prompt: str | None = None,
        chat_template: str | None = None,
        train_on: str = "completions",
        seq2seq: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        require_choice(FORMATS, format=format)
        require_choice(TRAIN_ON, train_on=train_on)
        # A decoder writes the completion alone, and no position_ids keep the rows apart that an encoder reads.
        if seq2seq and (self.packing or train_on == "everything"):
            option = "packing=True" if self.packing else "train_on='everything'"
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

    def _batching(self, split: str, predict: bool) -> Batching:
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
