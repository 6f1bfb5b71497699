"""P-tuning: a prompt that comes out of a small network. Liu et al., 2021, arXiv:2103.10385.

Trained are P vectors and an encoder that maps them to the prompt: an MLP (d -> h -> h -> d with ReLU), or a
bidirectional LSTM with an MLP (2h -> 2h -> d) behind it. Both are kept, so training resumes exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import adapter_dtype
from lightning_peft.core.fields import Count, Patterns, Probability
from lightning_peft.core.method import Method, Plan
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.prompting.prompts import plan_prompts


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """A prompt, made by an encoder, before the text of a transformers model.

    Raises:
        ConfigError: a field is out of range, or the model has too few positions.
        NotApplicableError: there is no transformers model that reads token ids.
    """

    exclusive: ClassVar[str] = "prompt"
    peft: ClassVar[PeftTable | None] = PeftTable(type="P_TUNING")

    num_virtual_tokens: Count = 20
    """Vectors of the prompt."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """What makes the prompt out of the trained vectors."""
    encoder_hidden_size: Count | None = None
    """Hidden features of the encoder; None for the width of the model's embeddings."""
    encoder_num_layers: Count = 2
    """Layers of the LSTM."""
    encoder_dropout: Probability = 0.0
    """Probability of dropping a feature between the layers of the LSTM."""
    modules_to_save: Patterns = "auto"
    """Modules fully trained beside the prompt: name suffixes; "auto" finds the task head of a transformers model."""

    @property
    def starts_as_base(self) -> bool:
        return False

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        return plan_prompts("PTuning", model, self.num_virtual_tokens, lambda table: EncodedPrompt(self, table.weight))


class EncodedPrompt(nn.Module):
    """The vectors and their encoder: () -> (P, d)."""

    def __init__(self, method: PTuning, table: Tensor) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": table.device, "dtype": adapter_dtype(table)}
        d = table.shape[1]
        h, layers = method.encoder_hidden_size or d, method.encoder_num_layers
        self.embedding = nn.Parameter(torch.randn(method.num_virtual_tokens, d, **options))
        if method.encoder == "mlp":
            self.lstm, sizes = None, [d, h, h, d]
        else:
            dropout = method.encoder_dropout if layers > 1 else 0.0  # between layers, of which there is one
            self.lstm = nn.LSTM(d, h, layers, dropout=dropout, bidirectional=True, batch_first=True, **options)
            sizes = [2 * h, 2 * h, d]
        linears = [nn.Linear(size_in, size_out, **options) for size_in, size_out in pairwise(sizes)]
        self.mlp = nn.Sequential(linears[0], *[layer for linear in linears[1:] for layer in (nn.ReLU(), linear)])

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """The prompt without dropout, (P, d)."""
        training = self.training
        prompt: Tensor = self.eval()()
        self.train(training)
        return prompt

    def forward(self) -> Tensor:
        x = self.embedding[None]
        if self.lstm is not None:
            x = self.lstm(x)[0]
        prompt: Tensor = self.mlp(x)[0]
        return prompt
