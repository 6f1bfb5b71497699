"""Text classification with any ``AutoModelForSequenceClassification``."""

from typing import Any, Literal, TypedDict

import rich
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.table import Table
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from typing_extensions import override

from lightning_peft.errors import DataError
from lightning_peft.training.checks import check_at_least
from lightning_peft.training.module import PEFTModule
from lightning_peft.training.tasks.pretrained import check_dropout, load_pretrained, tensors_to_read


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
        check_at_least("TextClassifier", 2, num_labels=num_labels)
        check_dropout(type(self).__name__, dropout)
        self.save_hyperparameters()
        self.model: Any = load_pretrained(
            "AutoModelForSequenceClassification", model, "to classify texts with", dropout, num_labels=num_labels
        )
        scores = MetricCollection(
            {
                # Micro is the share of all rows; macro, the default of torchmetrics, is the mean over classes.
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
        """Logits (rows, labels) of tokenized texts (rows, tokens)."""
        logits: Tensor = self.model(**inputs).logits
        return logits

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, _ = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._score(batch, "val", self.val_scores)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.confusion.update(self._score(batch, "test", self.test_scores), batch["labels"])

    @override
    def on_test_epoch_end(self) -> None:
        rank_zero_only(rich.print)(confusion_table(self.confusion.compute(), self.label_names))
        self.confusion.reset()

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Prediction]:
        probabilities, labels = self(**tensors_to_read(batch)).float().softmax(-1).max(-1)
        return [
            Prediction(text=text, label=self.label_names[label], probability=probability)
            for text, label, probability in zip(batch["text"], labels.tolist(), probabilities.tolist(), strict=True)
        ]

    def _score(self, batch: dict[str, Tensor], stage: str, scores: MetricCollection) -> Tensor:
        """Log loss and scores of a batch; return its logits (rows, labels)."""
        loss, logits = self._loss(batch)
        scores.update(logits, batch["labels"])
        self.log(f"{stage}_loss", loss, batch_size=len(logits))
        self.log_dict(scores, prog_bar=stage == "val", batch_size=len(logits))
        return logits

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = self(**tensors_to_read(batch))
        return torch.nn.functional.cross_entropy(logits.float(), batch["labels"]), logits


def confusion_table(counts: Tensor, names: list[str]) -> Table:
    """Lay out a confusion matrix ``counts`` (labels, labels): true labels down, predicted ones across."""
    table = Table(title="Confusion matrix", title_justify="left", title_style="bold")
    table.add_column("true \\ predicted")
    for name in names:
        table.add_column(name, justify="right")
    for name, row in zip(names, counts.tolist(), strict=True):
        table.add_row(name, *map(str, row))
    return table
