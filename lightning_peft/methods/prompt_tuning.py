"""Prompt tuning: learned vectors before the embedded text. Lester et al., 2021, arXiv:2104.08691.

The prompt, (P, d), is all that trains beside the task head. In an encoder-decoder model it stands before the encoder's
text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import adapter_dtype
from lightning_peft.core.fields import Count, Patterns
from lightning_peft.core.method import Method, Plan
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.core.starting import starts
from lightning_peft.errors import ConfigError
from lightning_peft.prompting.prompts import plan_prompts

_SAMPLE = 1024  # tokens whose embeddings tell how large a random prompt has to be


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """A learned prompt before the text of a transformers model.

    Raises:
        ConfigError: a field is out of range, the text cannot be tokenised, or the model has too few positions.
        NotApplicableError: there is no transformers model that reads token ids.
    """

    exclusive: ClassVar[str] = "prompt"
    # What an encoder has made is a prompt; peft does not save the encoder.
    peft: ClassVar[PeftTable | None] = PeftTable(type="PROMPT_TUNING")

    num_virtual_tokens: Count = 20
    """Vectors of the prompt."""
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    """What it starts from: random vectors as large as the model's embeddings, the embeddings of tokens drawn at random,
    or the embeddings of init_text, repeated or cut to num_virtual_tokens."""
    init_text: str | None = None
    """The text for init="text", such as "Is this review positive?"."""
    tokenizer: str | None = None
    """Name or path of the tokenizer for init_text."""
    modules_to_save: Patterns = "auto"
    """Modules fully trained beside the prompt: name suffixes; "auto" finds the task head of a transformers model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [bool(self.init_text), bool(self.tokenizer)]
        if not all(given) if self.init == "text" else any(given):
            raise ConfigError(
                f"PromptTuning: init={self.init!r} with init_text={self.init_text!r} and tokenizer={self.tokenizer!r}: "
                "init='text' needs both, the others take neither."
            )

    @property
    def starts_as_base(self) -> bool:
        return False

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        return plan_prompts("PromptTuning", model, self.num_virtual_tokens, lambda table: Prompt(self._start(table)))

    @torch.no_grad()
    def _start(self, embedding: nn.Embedding) -> Tensor:
        """The prompt at the start: (P, d)."""
        tokens, size = embedding.num_embeddings, self.num_virtual_tokens
        if not starts():  # the tokenizer need not be there any more
            return torch.zeros_like(embedding.weight[:1], dtype=adapter_dtype(embedding.weight)).repeat(size, 1)
        if self.init == "text":
            ids = torch.tensor(self._text_ids(tokens), device=embedding.weight.device)
        else:
            drawn = _SAMPLE if self.init == "random" else size
            ids = torch.randint(tokens, (drawn,), device=embedding.weight.device)
        # Looked up, since some models scale what they find in the table; not called, since hooks are for the text.
        rows: Tensor = embedding.forward(ids).to(adapter_dtype(embedding.weight))
        if self.init == "random":
            return rows.mean() + rows.std() * torch.randn_like(rows[:1].expand(size, -1))
        return rows.clone()

    def _text_ids(self, known: int) -> list[int]:
        """The ids of the text, repeated or cut to the size of the prompt."""
        ids = _token_ids(str(self.tokenizer), str(self.init_text))
        if not ids or max(ids) >= known:
            raise ConfigError(
                f"PromptTuning: the tokenizer {self.tokenizer!r} makes {len(ids)} tokens of {self.init_text!r}, the "
                f"largest {max(ids, default=None)}; the model knows {known}. Give the model's own tokenizer."
            )
        return (ids * -(-self.num_virtual_tokens // len(ids)))[: self.num_virtual_tokens]


class Prompt(nn.Module):
    """The vectors themselves: () -> (P, d)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(start)

    def vectors(self) -> Tensor:
        """The prompt, (P, d)."""
        return self.embedding

    def forward(self) -> Tensor:
        return self.embedding


def _token_ids(tokenizer: str, text: str) -> list[int]:
    """The ids of a text, without special tokens."""
    from transformers import AutoTokenizer  # only here: it is slow to import

    try:
        ids: list[int] = AutoTokenizer.from_pretrained(tokenizer)(text, add_special_tokens=False)["input_ids"]
    except (OSError, ValueError) as error:
        raise ConfigError(f"PromptTuning.tokenizer: {tokenizer!r} cannot be loaded: {error}") from error
    return ids
