"""The functions that ``datasets`` maps over rows and caches: from a row to token ids, or to why it cannot be used."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from lightning_peft.data.sources.batches import HIDDEN
from lightning_peft.data.sources.chat import Chat, Segment, encode, encode_pairs
from lightning_peft.data.sources.conversations import Conversation, read_conversation
from lightning_peft.data.sources.loading import Source
from lightning_peft.data.sources.records import BadRowError, RowReport, parse, require_text

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("completions", "last", "everything")

# The columns of an example with their types; a bad row has these values.
_TEXT_COLUMNS = {"input_ids": "int32s", "length": "int32", "cut": "bool"}
_OUTCOME_COLUMNS = {"number": "int64", "reason": "string", "message": "string"}
_INSTRUCTION_COLUMNS = {"labels": "int32s", "prompt_length": "int32", "prompt": "string", "completion": "string"}
_EMPTY: dict[str, Any] = {"int32s": [], "int32": 0, "bool": False, "string": ""}


@dataclass
class PrepareInstructions:
    """Make token ids and labels of rows that hold conversations.

    ``datasets`` names its cache file after a hash of this object's pickle, in which a digest stands for the tokenizer.

    Attributes:
        chat: Tokenizer and template.
        digest: Of the tokenizer, as freshly loaded.
        first: The number of the first row: 1 where rows are lines of a file.
        reading: Arguments of :func:`~lightning_peft.data.sources.conversations.read_conversation`.
        train_on: ``"completions"``, ``"last"`` or ``"everything"``.
        max_length: Longer rows are cut at their end.
        seq2seq: True if the labels are the last completion alone, and the input is the text before it.
        prompts: True to make prompts alone.
    """

    chat: Chat
    digest: str
    _: KW_ONLY
    first: int
    reading: dict[str, Any]
    train_on: str
    max_length: int
    seq2seq: bool
    prompts: bool

    version = 1  # in the hash: raise it when the output changes
    columns = _TEXT_COLUMNS | _INSTRUCTION_COLUMNS | _OUTCOME_COLUMNS

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"chat": self.chat.settings, "version": self.version}

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Return an example or more for each good row, and one without ids for a bad one."""
        examples: list[dict[str, Any]] = []
        read: list[tuple[int, Conversation, int, list[Segment]]] = []
        for number, row in parse(rows, [index + self.first for index in indices]):
            with _listed_if_bad(examples, number, self.columns):
                conversation = read_conversation(_good(row), **self.reading, answered=not self.prompts)
                read += [(number, conversation, *text) for text in self._segment(conversation)]
        texts = [segments for *_, segments in read]
        encoded = encode_pairs(self.chat, texts) if self.seq2seq else encode(self.chat.tokenizer, texts)
        for (number, conversation, turn, _), pieces in zip(read, encoded, strict=True):
            with _listed_if_bad(examples, number, self.columns):
                example = self._finish_pair(pieces) if self.seq2seq else self._finish(pieces)
                spoken = [said.content for said in conversation.turns]
                shown = {"prompt": spoken[turn - 1], "completion": spoken[turn] if turn < len(spoken) else ""}
                examples.append(example | shown | {"number": number, "reason": "", "message": ""})
        _forgive(examples)
        examples.sort(key=lambda example: example["number"])  # stable: the examples of a row keep their order
        return {column: [example[column] for example in examples] for column in self.columns}

    def _segment(self, conversation: Conversation) -> list[tuple[int, list[Segment]]]:
        """Return the texts to encode, each with the turn that is its last completion."""
        if not (self.prompts or self.seq2seq):
            learned = conversation.completions[-1:] if self.train_on == "last" else conversation.completions
            texts = self.chat.segment(conversation, learned)
            return texts[-1:] if self.train_on == "everything" else texts  # the last has all that was said before
        turns = conversation.turns
        last = len(turns) - (turns[-1].role == "assistant")
        text = self.chat.render_prompt(conversation, last, encoder=self.seq2seq)
        answers = [] if self.prompts else [Segment(text=turns[last].content, learned=True)]
        return [(last, [Segment(text=text, learned=False), *answers])]

    def _finish(self, pieces: list[tuple[list[int], bool]]) -> dict[str, Any]:
        ids = [token for tokens, _ in pieces for token in tokens]
        labels = [token if learned else HIDDEN for tokens, learned in pieces for token in tokens]
        # Up to the completion even where everything is learned: a row that is cut before it shows none.
        first = next((position for position, label in enumerate(labels) if label != HIDDEN), len(ids))
        if first + (not self.prompts) > self.max_length:
            raise BadRowError("too long", f"its prompt alone has {first} tokens, and max_length={self.max_length}")
        return {
            "input_ids": ids[: self.max_length],
            "labels": (ids if self.train_on == "everything" else labels)[: self.max_length],
            "length": min(len(ids), self.max_length),
            "prompt_length": len(ids) - len(pieces[-1][0]) * pieces[-1][1],
            "cut": len(ids) > self.max_length,
        }

    def _finish_pair(self, pieces: list[tuple[list[int], bool]]) -> dict[str, Any]:
        source, target = pieces[0][0], [token for tokens, _ in pieces[1:] for token in tokens]
        # The encoder's text keeps its end token; a completion that is cut does not end there.
        kept = source if len(source) <= self.max_length else [*source[: self.max_length - 1], source[-1]]
        return {
            "input_ids": kept,
            "labels": target[: self.max_length],
            "length": len(kept),
            "prompt_length": len(kept),
            "cut": max(len(source), len(target)) > self.max_length,
        }


@dataclass
class PrepareTexts:
    """Make token ids of texts, each ended by the end token.

    Attributes:
        tokenizer: The tokenizer.
        digest: Of the tokenizer, as freshly loaded.
        first: The number of the first row: 1 where rows are lines of a file.
        text_column: The column of the text.
        max_length: Longer texts are cut; None: they are not.
    """

    tokenizer: "PreTrainedTokenizerBase"
    digest: str
    _: KW_ONLY
    first: int
    text_column: str
    max_length: int | None

    version = 1  # in the hash: raise it when the output changes
    columns = _TEXT_COLUMNS | _OUTCOME_COLUMNS

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tokenizer": self.tokenizer.eos_token_id, "version": self.version}

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Return an example for each row, one without ids for a bad one."""
        examples: list[dict[str, Any]] = []
        texts: list[str] = []
        for number, row in parse(rows, [index + self.first for index in indices]):
            with _listed_if_bad(examples, number, self.columns):
                texts.append(require_text(_good(row).get(self.text_column), self.text_column, "no text"))
                examples.append({"number": number, "reason": "", "message": ""})
        encoded = iter(self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else [])
        eos = self.tokenizer.eos_token_id
        for example in examples:
            if not example["reason"]:
                ids = next(encoded)
                # Some tokenizers end every text by themselves.
                ids = ids if ids[-1:] == [eos] else [*ids, eos]
                kept = ids[: self.max_length]
                example |= {"input_ids": kept, "length": len(kept), "cut": len(kept) < len(ids)}
        return {column: [example[column] for example in examples] for column in self.columns}


def prepare(
    source: Source, function: PrepareInstructions | PrepareTexts, description: str
) -> "tuple[Dataset, RowReport]":
    """Map one of the functions here over rows; return all its examples, and what became of the rows."""
    from datasets import Features, List, Value

    # The types are stated: in a first batch of bad rows alone, Arrow would find no type for the empty lists.
    types = {
        column: List(Value("int32")) if kind == "int32s" else Value(kind) for column, kind in function.columns.items()
    }
    examples = source.rows.map(
        function,
        with_indices=True,
        batched=True,
        batch_size=256,
        remove_columns=source.rows.column_names,
        features=Features(types),
        desc=description,
    )
    outcome = examples.select_columns(["number", "reason", "message", "cut"]).with_format("arrow")[:].to_pydict()
    bad: dict[str, list[int]] = {}
    messages: dict[str, str] = {}
    for number, reason, message in zip(outcome["number"], outcome["reason"], outcome["message"], strict=True):
        if reason:
            bad.setdefault(reason, []).append(number)
            messages.setdefault(reason, message)
    report = RowReport(
        origin=source.origin,
        lines=source.lines,
        rows=len(set(outcome["number"])),
        bad=bad,
        examples=messages,
        cut=sorted({number for number, is_cut in zip(outcome["number"], outcome["cut"], strict=True) if is_cut}),
    )
    return examples, report


def _good(row: Any) -> dict[str, Any]:
    if isinstance(row, BadRowError):
        raise row
    return row


@contextmanager
def _listed_if_bad(examples: list[dict[str, Any]], number: int, columns: dict[str, str]) -> Iterator[None]:
    """Within the ``with`` block, add an example without ids if the row turns out to be bad."""
    try:
        yield
    except BadRowError as error:
        empty = {column: _EMPTY[kind] for column, kind in columns.items() if kind in _EMPTY}
        examples.append(empty | {"number": number, "reason": error.reason, "message": str(error)})


def _forgive(examples: list[dict[str, Any]]) -> None:
    """A row that became several texts, of which some are good, is not bad but cut."""
    good = {example["number"] for example in examples if not example["reason"]}
    short = {example["number"] for example in examples if example["reason"]} & good
    examples[:] = [example for example in examples if not (example["reason"] and example["number"] in short)]
    for example in examples:
        example["cut"] = example["cut"] or example["number"] in short
