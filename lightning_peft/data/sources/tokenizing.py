"""From texts to padded batches: the tokenizer, the function that ``datasets`` maps and caches, the collate function."""

import hashlib
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.data.sources.batches import pad, pad_ids
from lightning_peft.data.sources.loading import looks_local, require_path
from lightning_peft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str, max_length: int, pair: bool = False) -> "tuple[PreTrainedTokenizerBase, str]":
    """Load a tokenizer by path or hub name; return it with its :func:`digest` as it was loaded.

    Args:
        name: The path or the name.
        max_length: Tokens of a row, which must leave room for text and be no more than the model takes.
        pair: True if a row holds two texts.

    Raises:
        DataError: If it is not there or cannot be loaded.
        ConfigError: If ``max_length`` does not fit.
    """
    from transformers import AutoTokenizer

    path = str(require_path(name, "tokenizer")) if looks_local(name) else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    # Not only OSError: of a broken file the library in Rust raises a bare Exception.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"tokenizer: cannot load {name!r}: {reason}") from error
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise ConfigError(f"max_length={max_length} leaves no room for text: {special} tokens are special ones.")
    if max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"max_length={max_length} is more than the {tokenizer.model_max_length} tokens that the model of "
            f"tokenizer {tokenizer.name_or_path!r} takes. Make it smaller."
        )
    return tokenizer, digest(tokenizer)


@dataclass
class Tokenize:
    """The function to map over the rows, in batches.

    ``datasets`` names its cache file after a hash of this object's pickle. A tokenizer is not the same after its first
    call (it keeps the truncation settings), so the pickle holds a digest in its place, taken before that call.

    Attributes:
        tokenizer: The tokenizer.
        digest: Its :func:`digest` as freshly loaded.
        max_length: Longer texts are cut to this many tokens.
        text_column: The column of the text.
        text_pair_column: The column of the second text, if any.
        label_column: The column of the label.
        label_ids: Class index by value of that column, or None for rows without labels.
    """

    tokenizer: "PreTrainedTokenizerBase"
    digest: str
    _: KW_ONLY
    max_length: int
    text_column: str
    text_pair_column: str | None
    label_column: str
    label_ids: dict[Any, int] | None

    version = 1  # in the hash: raise it when the output changes

    def __getstate__(self) -> dict[str, Any]:
        # Sorted, since the order in which labels first appear changes nothing.
        ids = None if self.label_ids is None else sorted(self.label_ids.items(), key=repr)
        return self.__dict__ | {"tokenizer": None, "label_ids": ids, "version": self.version}

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return ``input_ids``, ``token_type_ids`` (if the model has them), ``length``, text and label of the rows."""
        texts = rows[self.text_column]
        pairs = rows[self.text_pair_column] if self.text_pair_column else None
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length, return_attention_mask=False)
        output = {key: encoded[key] for key in ("input_ids", "token_type_ids") if key in encoded}
        output |= {"length": [len(ids) for ids in encoded["input_ids"]], "text": texts}
        if pairs is not None:
            output["text_pair"] = pairs
        if self.label_ids is not None:
            output["labels"] = [self.label_ids[label] for label in rows[self.label_column]]
        return output


def digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a hash of everything about a freshly loaded tokenizer that its output depends on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    settings = (type(tokenizer).__name__, tokenizer.truncation_side, tokenizer.model_input_names)
    return hashlib.sha256(f"{settings}\n{content}".encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PaddingCollator:
    """Pad rows to the longest of the batch. At module level and without a tokenizer, so that it pickles for workers.

    Attributes:
        pad_token_id: What ``input_ids`` are filled up with.
        pad_token_type_id: What ``token_type_ids`` are filled up with.
        padding_side: ``"right"`` or ``"left"``.
    """

    pad_token_id: int
    pad_token_type_id: int
    padding_side: str

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return ``input_ids``, ``attention_mask``, and of ``token_type_ids``, ``labels``, texts what the rows have."""
        batch = pad_ids([torch.tensor(row["input_ids"]) for row in rows], self.pad_token_id, self.padding_side)
        if "token_type_ids" in rows[0]:
            types = [torch.tensor(row["token_type_ids"]) for row in rows]
            batch["token_type_ids"] = pad(types, self.pad_token_type_id, self.padding_side)
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])  # (rows,)
        return batch | {key: [row[key] for row in rows] for key in ("text", "text_pair") if key in rows[0]}


def find_pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return what to pad with: the padding token, or without one the end-of-text token.

    Raises:
        ConfigError: If the tokenizer has neither.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ConfigError(f"tokenizer {tokenizer.name_or_path!r} has neither a padding nor an end-of-text token.")
    return pad
