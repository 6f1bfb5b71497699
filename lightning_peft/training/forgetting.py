"""What a language model forgets while it learns a task, measured as its perplexity on text of another kind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning as L
import rich
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from lightning_peft.errors import ConfigError
from lightning_peft.injection.activation import active_adapters, disabled
from lightning_peft.network.pretrained import pretrained_models
from lightning_peft.training.checks import check_at_least
from lightning_peft.training.modes import in_eval
from lightning_peft.training.tasks.completions import padded
from lightning_peft.training.tasks.pretrained import load_tokenizer
from lightning_peft.training.tasks.token_loss import (
    IGNORED,
    LossForm,
    count_tokens,
    loss_form,
    next_tokens,
    run_to_head,
    without_first,
)
from lightning_peft.training.tasks.token_scores import TokenScores


@dataclass(frozen=True, kw_only=True)
class GeneralScore:
    """One measurement."""

    step: int
    """Optimizer steps before it."""
    perplexity: float
    """Of the model as it is."""
    base_perplexity: float | None
    """Of the model with its adapters switched off; None where there are none."""


class ForgettingMonitor(L.Callback):
    """Scores a causal language model on general text before, during and after ``fit``, its adapters on and off.

    Logs ``general_perplexity`` and, where there are adapters, ``general_base_perplexity``, which cannot change; the
    table of all of them is printed at the end. :attr:`scores` has them, too.

    Args:
        data: texts, or a data module (``TextData``), whose validation batches are scored.
        every_n_steps: how many optimizer steps to leave between two measurements, at least 0; 0 measures after each
            epoch.
        max_batches: how many batches to score at most, at least 0; 0 for all.
        max_length: how many tokens of each text to score, at least 2. A data module has its own.
        batch_size: how many texts to score at once, at least 1. A data module has its own.

    Raises:
        ConfigError: an argument is out of range; or, when the fit starts, there is no causal language model of
            transformers in the module, or nothing to score.
    """

    def __init__(
        self,
        data: L.LightningDataModule | Sequence[str],
        every_n_steps: int = 0,
        max_batches: int = 0,
        max_length: int = 512,
        batch_size: int = 4,
    ) -> None:
        super().__init__()
        check_at_least("ForgettingMonitor", 0, every_n_steps=every_n_steps, max_batches=max_batches)
        check_at_least("ForgettingMonitor", 1, batch_size=batch_size)
        check_at_least("ForgettingMonitor", 2, max_length=max_length)  # the first token is not scored
        if isinstance(data, str):
            raise ConfigError(f"ForgettingMonitor needs a list of texts or a data module, not the one text {data!r}.")
        self.data, self.every_n_steps, self.max_batches = data, every_n_steps, max_batches
        self.max_length, self.batch_size = max_length, batch_size
        self.scores: list[GeneralScore] = []
        self._model: Any = None
        self._form: LossForm = "logits"
        self._batches: list[dict[str, Tensor]] = []

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._model = _causal_model(pl_module)
        self._form = loss_form(self._model, shifted=True)
        self._batches = list(islice(self._read(), self.max_batches or None))
        if not self._batches:
            raise ConfigError("ForgettingMonitor has nothing to score: its data has no texts to validate on.")
        self.scores = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_outside_epochs(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self.scores[-1].step:
            pl_module.log_dict(self._measure(trainer, pl_module))

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.every_n_steps and trainer.global_step != self.scores[-1].step:
            pl_module.log_dict(self._measure(trainer, pl_module))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self.scores[-1].step:
            self._log_outside_epochs(trainer, pl_module)
        rank_zero_only(rich.print)(forgetting_table(self.scores))

    def _log_outside_epochs(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = self._measure(trainer, pl_module)
        for logger in trainer.loggers:  # the module's own log would take it for a part of an epoch
            logger.log_metrics(values, step=trainer.global_step)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        values = {"general_perplexity": self._perplexity(trainer, pl_module)}
        if active_adapters(pl_module):
            with disabled(pl_module):
                values["general_base_perplexity"] = self._perplexity(trainer, pl_module)
        perplexity, base = values["general_perplexity"], values.get("general_base_perplexity")
        self.scores.append(GeneralScore(step=trainer.global_step, perplexity=perplexity, base_perplexity=base))
        return values

    @torch.no_grad()
    def _perplexity(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float:
        scores = TokenScores().to(pl_module.device)
        with in_eval(self._model), trainer.precision_plugin.forward_context():
            for batch in self._batches:
                inputs = {name: tensor.to(pl_module.device) for name, tensor in batch.items()}
                labels = without_first(inputs.pop("labels"), inputs.get("position_ids"))
                scores.update(*count_tokens(*run_to_head(self._model, inputs, self._form), next_tokens(labels)))
        # Every process has scored all of it.
        return math.exp(float(scores.loss / scores.count)) if scores.count else math.nan

    def _read(self) -> Any:
        if isinstance(self.data, L.LightningDataModule):
            self.data.prepare_data()
            self.data.setup("validate")
            return self.data.val_dataloader()
        return self._tokenize(list(self.data))

    def _tokenize(self, texts: list[str]) -> list[dict[str, Tensor]]:
        purpose, remedy = "to read its texts with", "or give a data module (TextData)"
        tokenizer = load_tokenizer(self._model.name_or_path, "ForgettingMonitor", purpose, remedy)
        # Padded here: a tokenizer without a padding token, as GPT-2's, refuses to do so.
        rows = [torch.tensor(tokenizer(text)["input_ids"][: self.max_length]) for text in texts]
        batches = []
        for start in range(0, len(rows), self.batch_size):
            ids, mask = padded(rows[start : start + self.batch_size])
            labels = ids.masked_fill(mask == 0, IGNORED)
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        return batches


def forgetting_table(scores: Sequence[GeneralScore]) -> Table:
    """Lay out perplexities by step, and how they have changed since the first."""
    table = Table(title="Perplexity on general text", title_justify="left", title_style="bold")
    for column in ("step", "as trained", "change", "adapters off"):
        table.add_column(column, justify="right")
    for score in scores:
        base = "" if score.base_perplexity is None else f"{score.base_perplexity:.2f}"
        change = score.perplexity / scores[0].perplexity - 1
        table.add_row(str(score.step), f"{score.perplexity:.2f}", f"{change:+.1%}", base)
    return table


def _causal_model(pl_module: L.LightningModule) -> Any:
    for _, model in pretrained_models(pl_module):
        if model.get_output_embeddings() is not None and not model.config.is_encoder_decoder:
            return model
    raise ConfigError(
        f"ForgettingMonitor scores causal language models, and {type(pl_module).__name__} holds none of transformers."
    )
