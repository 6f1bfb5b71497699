"""Text classification with any ``AutoModelForSequenceClassification``."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

import rich
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.table import Table
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from typing_extensions import override

from lightning_peft.errors import ConfigError, DataError
from lightning_peft.training.module import PEFTModule


class Prediction(TypedDict):
    """What ``predict`` gives for one text."""

    text: str
    label: str
    probability: float
    """Probability of ``label``, 0 to 1."""


class TextClassifier(PEFTModule):
    """A pretrained encoder or decoder with a classification head, for batches from ``TextClassificationData``.

    Logs ``train_loss``, and for validation and test ``{val,test}_{loss,accuracy,f1}``; F1 is the mean over classes. A
    test ends with a confusion matrix on the screen.

    Args:
        model: name or path of the pretrained model, for ``AutoModelForSequenceClassification``.
        num_labels: number of classes, at least 2.
        dropout: probability of the model's own dropout layers, at least 0 and less than 1; None leaves it as it was
            pretrained. Adapters of a few million parameters often do well without, and a step is faster.
        lr: peak learning rate, greater than 0.
        weight_decay: decoupled weight decay of AdamW, at least 0.
        warmup: share of all steps over which the learning rate rises, at least 0 and less than 1.
        schedule: ``"constant"``, or ``"linear"`` or ``"cosine"`` decay after the warm-up.

    Raises:
        ConfigError: an argument is out of range, or there is no such model.
    """

    def __init__(
        self,
        model: str,
        num_labels: int = 2,
        dropout: float | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        schedule: Literal["constant", "linear", "cosine"] = "cosine",
    ) -> None:
        super().__init__(lr, weight_decay, warmup, schedule)
        if num_labels < 2:
            raise ConfigError(f"TextClassifier: num_labels={num_labels} must be at least 2.")
        if dropout is not None and not 0 <= dropout < 1:
            raise ConfigError(f"TextClassifier: dropout={dropout} must be at least 0 and less than 1.")
        self.save_hyperparameters()
        self.model = _pretrained(model, num_labels)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout) and dropout is not None:
                module.p = dropout
        scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_labels, average="micro"),
                "f1": MulticlassF1Score(num_labels, average="macro"),
            }
        )
        self.val_scores, self.test_scores = scores.clone(prefix="val_"), scores.clone(prefix="test_")
        self.confusion = MulticlassConfusionMatrix(num_labels)
        self.label_names = [str(i) for i in range(num_labels)]

    @override
    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "check_head"):  # another data module: the labels stay numbers
            return
        try:
            data.check_head(self.confusion.num_classes)
            # The head may hold more labels than this data has; the others keep their number as a name.
            self._name_labels([*data.label_names, *self.label_names[data.num_labels :]])
        except DataError:
            if stage != "predict":  # rows to predict need no labels
                raise

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["label_names"] = list(self.label_names)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._name_labels(list(checkpoint.get("label_names", self.label_names)))

    def _name_labels(self, names: list[str]) -> None:
        self.label_names = names
        # So that a merged model, saved for transformers, says them too.
        self.model.config.id2label = dict(enumerate(names))
        self.model.config.label2id = {name: i for i, name in enumerate(names)}

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (rows, labels) of tokenised texts (rows, tokens)."""
        logits: Tensor = self.model(**inputs).logits
        return logits

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, _ = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, logits = self._loss(batch)
        self.val_scores.update(logits, batch["labels"])
        self.log("val_loss", loss, batch_size=len(logits))
        self.log_dict(self.val_scores, prog_bar=True, batch_size=len(logits))

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, logits = self._loss(batch)
        self.test_scores.update(logits, batch["labels"])
        self.confusion.update(logits, batch["labels"])
        self.log("test_loss", loss, batch_size=len(logits))
        self.log_dict(self.test_scores, batch_size=len(logits))

    @override
    def on_test_epoch_end(self) -> None:
        rank_zero_only(rich.print)(confusion_table(self.confusion.compute(), self.label_names))
        self.confusion.reset()

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Prediction]:
        texts = batch.pop("text")
        batch = {key: value for key, value in batch.items() if isinstance(value, Tensor) and key != "labels"}
        probabilities, labels = self(**batch).float().softmax(-1).max(-1)
        return [
            Prediction(text=text, label=self.label_names[label], probability=probability)
            for text, label, probability in zip(texts, labels.tolist(), probabilities.tolist(), strict=True)
        ]

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"]
        logits = self(**{key: value for key, value in batch.items() if key != "labels"})
        return torch.nn.functional.cross_entropy(logits.float(), labels), logits


def confusion_table(counts: Tensor, names: list[str]) -> Table:
    """Lay out a confusion matrix ``counts`` (labels, labels): true labels down, predicted ones across."""
    table = Table(title="Confusion matrix", title_justify="left", title_style="bold")
    table.add_column("true \\ predicted")
    for name in names:
        table.add_column(name, justify="right")
    for name, row in zip(names, counts.tolist(), strict=True):
        table.add_row(name, *map(str, row))
    return table


def _pretrained(model: str, num_labels: int) -> Any:
    from transformers import AutoModelForSequenceClassification  # slow to import, and only needed here

    try:
        with _quiet():
            network, info = AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=num_labels, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"There is no model to classify texts with at {model!r}: {str(error).strip().splitlines()[0]} "
            "Give a folder with config.json and weights, or a model name on the hub. (The demo's is fetched by "
            "`python examples/assets.py`.)"
        ) from error
    base = f"{network.base_model_prefix}."
    if fresh := sorted(key for key in info["missing_keys"] if key.startswith(base)):
        warnings.warn(
            f"{len(fresh)} tensors of the base are not in {model!r} and start at random, first '{fresh[0]}'. An "
            "adapter checkpoint would not hold them: add their modules to modules_to_save.",
            stacklevel=3,
        )
    config = network.config.get_text_config()
    if config.pad_token_id is None:  # GPT-2, Llama: the data module pads with the end-of-text token, too
        ends = config.eos_token_id
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    # transformers returns models in eval mode and Lightning keeps the mode it finds: dropout would stay off.
    return network.train()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting the new head, which is expected, and from drawing a progress bar."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
