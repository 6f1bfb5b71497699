"""What the tasks that write text share: a loss and scores without logits, samples on the screen, and prediction."""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import rich
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.injection.registry import registries
from lightning_peft.network.walk import join
from lightning_peft.training.checks import check_at_least
from lightning_peft.training.module import PEFTModule
from lightning_peft.training.pending import setup_of
from lightning_peft.training.tasks.completions import Completion, completion_table, padded
from lightning_peft.training.tasks.pretrained import check_dropout, checkpoint_layers, load_pretrained, load_tokenizer
from lightning_peft.training.tasks.token_loss import (
    LossForm,
    chunked_cross_entropy,
    count_tokens,
    loss_form,
    run_to_head,
)
from lightning_peft.training.tasks.token_scores import TokenScores


class LanguageModel(PEFTModule):
    """A pretrained language model that is trained on texts; its subclasses say how it reads them.

    Logs ``train_loss``, and for validation and test ``{val,test}_{loss,accuracy,perplexity}``: the mean over all
    tokens with a label, how many of them come first among all, and the exponential of that loss. A validation ends
    with a few texts on the screen that the model has written, and so does the sanity check before the first step.

    Args:
        model: name or path of the pretrained model.
        dropout: probability of the model's own dropout layers, at least 0 and less than 1; None leaves it as it was
            pretrained.
        gradient_checkpointing: True to compute every layer again in the backward and keep no activations inside of
            it: a third more time, and much less memory for long texts.
        max_new_tokens: how many tokens to write at most, at least 1.
        samples: how many texts to write at the end of a validation, at least 0.
        lr: peak learning rate, greater than 0.
        weight_decay: decoupled weight decay of AdamW, at least 0.
        warmup: share of all steps over which the learning rate rises, at least 0 and less than 1.
        schedule: ``"constant"``, or ``"linear"`` or ``"cosine"`` decay after the warm-up.

    Raises:
        ConfigError: an argument is out of range, or there is no such model.
    """

    auto_class: ClassVar[str]
    """The class of transformers that loads the model."""
    shifted: ClassVar[bool]
    """True if the label of a token is what comes after it."""
    padding_side: ClassVar[Literal["left", "right"]]
    """Where prompts to go on from are padded."""
    writes: ClassVar[tuple[str, ...]] = ("predict",)
    """The stages in which it writes, beside the samples of a validation."""

    def __init__(
        self,
        model: str,
        dropout: float | None = None,
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 64,
        samples: int = 2,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.06,
        schedule: Literal["constant", "linear", "cosine"] = "cosine",
    ) -> None:
        super().__init__(lr, weight_decay, warmup, schedule)
        check_at_least(type(self).__name__, 1, max_new_tokens=max_new_tokens)
        check_at_least(type(self).__name__, 0, samples=samples)
        check_dropout(type(self).__name__, dropout)
        self.save_hyperparameters()
        self.max_new_tokens, self.samples = max_new_tokens, samples
        self.gradient_checkpointing = gradient_checkpointing
        self.model: Any = load_pretrained(self.auto_class, model, "to write texts with", dropout)
        if gradient_checkpointing:
            checkpoint_layers(self.model)
        self.val_scores, self.test_scores = TokenScores(), TokenScores()
        self._tokenizer: Any = None
        self._known_form: LossForm | None = None
        self._shown: list[tuple[Tensor, Tensor]] = []  # prompts to write on from, and what should come of them

    @abstractmethod
    def read(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Arguments for the model, labels for its own loss, and what each of its outputs is to predict."""

    @abstractmethod
    def examples(self, batch: dict[str, Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
        """The prompts of up to ``count`` rows, and what should come of them, as token ids."""

    @abstractmethod
    def written(self, sequences: Tensor, prompt: Tensor) -> Tensor:
        """The new tokens of ``sequences`` (rows, tokens) that were generated from ``prompt`` (rows, fewer tokens)."""

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (rows, tokens, vocabulary) of tokenized texts (rows, tokens)."""
        logits: Tensor = self.model(**inputs).logits
        return logits

    @override
    def setup(self, stage: str) -> None:
        if stage in self.writes or (stage in ("fit", "validate") and self.samples):
            self._tokenizer = self._find_tokenizer()

    @override
    def on_fit_start(self) -> None:
        if self.gradient_checkpointing and setup_of(self).frozen_mode == "eval":
            raise ConfigError(
                f"{type(self).__name__}(gradient_checkpointing=True): transformers checkpoints layers in train mode "
                "alone, and PEFTCallback(frozen_mode='eval') holds them in eval. Leave one of the two out; "
                "dropout=0 turns the model's own dropout off, too."
            )

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        inputs, labels, goals = self.read(batch)
        if self._form() == "own":
            loss = self.model(**inputs, labels=labels, use_cache=False).loss
        else:
            loss = chunked_cross_entropy(*self._hidden(inputs), goals)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._score(batch, self.val_scores)
        if self.trainer.is_global_zero:
            self._shown += self.examples(batch, self.samples - len(self._shown))

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._score(batch, self.test_scores)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", self.val_scores)
        shown, self._shown = self._shown, []
        if shown:
            with self.trainer.precision_plugin.forward_context():
                title = "Samples before training" if self.trainer.sanity_checking else "Samples"
                rank_zero_only(rich.print)(completion_table(self._complete(shown), title))

    @override
    def on_test_epoch_end(self) -> None:
        self._log_scores("test", self.test_scores)

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> list[Completion]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        prompts = batch.get("prompt") or self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        rows = [
            Completion(prompt=prompt, completion=completion)
            for prompt, completion in zip(prompts, self.write(ids, mask), strict=True)
        ]
        for row, expected in zip(rows, batch.get("completion") or (), strict=False):
            row["expected"] = expected
        return rows

    def write(self, input_ids: Tensor, attention_mask: Tensor) -> list[str]:
        """What the model goes on with, always by its most probable token, behind each row.

        Args:
            input_ids: (rows, tokens).
            attention_mask: the same shape; 0 in the padding.
        """
        sequences = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=self._ends(),
            pad_token_id=self._padding(),
            # A hub model's own settings only matter where tokens are drawn, and transformers warns of them.
            **dict.fromkeys(("temperature", "top_p", "top_k")),
        )
        texts: list[str] = self._tokenizer.batch_decode(self.written(sequences, input_ids), skip_special_tokens=True)
        return texts

    def _form(self) -> LossForm:
        if self._known_form is None:
            self._known_form = loss_form(self.model, self.shifted)
        return self._known_form

    def _hidden(self, inputs: dict[str, Tensor]) -> tuple[nn.Module, Tensor]:
        return run_to_head(self.model, inputs, self._form())

    def _score(self, batch: dict[str, Any], scores: TokenScores) -> None:
        inputs, _, goals = self.read(batch)
        scores.update(*count_tokens(*self._hidden(inputs), goals))

    def _log_scores(self, stage: str, scores: TokenScores) -> None:
        values = {f"{stage}_{name}": value for name, value in scores.compute().items()}
        self.log_dict(values, prog_bar=True, sync_dist=True)  # the same in every process already
        scores.reset()

    def _complete(self, examples: list[tuple[Tensor, Tensor]]) -> list[Completion]:
        prompts, expected = zip(*examples, strict=True)
        ids, mask = padded(prompts, self._padding(), self.padding_side)
        texts = [self._tokenizer.batch_decode(list(rows), skip_special_tokens=True) for rows in (prompts, expected)]
        return [
            Completion(prompt=prompt, completion=completion, expected=goal)
            for prompt, completion, goal in zip(texts[0], self.write(ids, mask), texts[1], strict=True)
        ]

    def _padding(self) -> int:
        return int(self.model.config.get_text_config().pad_token_id or 0)  # what it is hardly matters: it is masked

    def _ends(self) -> list[int]:
        """Tokens that end a text: the model's, and the one that the data ends its texts with."""
        own = self.model.generation_config.eos_token_id
        ends = [*(own if isinstance(own, list) else [own]), self._tokenizer.eos_token_id]
        return list(dict.fromkeys(token for token in ends if token is not None))

    def _find_tokenizer(self) -> Any:
        """The tokenizer of the data, which may be named by a path; else the one beside the model.

        Raises:
            ConfigError: there is none.
        """
        found = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if hasattr(found, "batch_decode"):
            return found
        remedy = "give the data module one as its attribute `tokenizer`, or, to train without, set samples=0"
        path = self.model.name_or_path if found is None else found
        return load_tokenizer(path, type(self).__name__, "to show texts with", remedy)


def check_whole_rows(module: nn.Module, position_ids: Tensor) -> None:
    """Raise if rows hold several texts, as ``position_ids`` tell, and an acting adapter takes a row for one.

    Args:
        module: the module with the adapters.
        position_ids: (rows, tokens), from 0 in each text.

    Raises:
        NotApplicableError: it does.
    """
    for place, _, registry in registries(module):
        for path, slots in registry.slots.items():
            if slots.needs_whole_sequences() and bool((position_ids.diff(dim=-1) < 0).any()):
                where = join(place, path)
                raise NotApplicableError(
                    f"The batch has several texts in one row (their position_ids begin anew), and an adapter of "
                    f"'{where}' takes a row for one text: virtual tokens stand before a row once, a gate is a mean "
                    "over it. Give the data module packing=False."
                )
