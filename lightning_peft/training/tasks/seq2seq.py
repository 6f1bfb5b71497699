"""Text made of another one, with any ``AutoModelForSeq2SeqLM``."""

from typing import Any, ClassVar, Literal

from torch import Tensor
from torchmetrics.text import ROUGEScore
from typing_extensions import override

from lightning_peft.training.tasks.language_model import LanguageModel
from lightning_peft.training.tasks.pretrained import tensors_to_read
from lightning_peft.training.tasks.token_loss import IGNORED

_ROUGE = ("rouge1", "rouge2", "rougeL")  # rougeLsum would need sentences, and nltk's data for them


class Seq2SeqLM(LanguageModel):
    """A pretrained encoder-decoder that is trained to write one text for another: a summary, a translation.

    A batch has ``input_ids`` and ``attention_mask`` (rows, tokens), padded at the end, and ``labels`` (rows, other
    tokens): the text to write, and -100 for its padding. To predict it needs no labels, and may have lists of str,
    ``prompt`` and ``completion``. A test writes every text, and logs ``test_rouge{1,2,L}``, the F-measures of ROUGE,
    without stemming, beside the scores of its tokens.
    """

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    shifted: ClassVar[bool] = False
    padding_side: ClassVar[Literal["left", "right"]] = "right"
    writes: ClassVar[tuple[str, ...]] = ("test", "predict")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rouge = ROUGEScore(rouge_keys=_ROUGE)

    @override
    def read(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        labels = batch["labels"]
        inputs = tensors_to_read(batch)
        inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels)
        return inputs, labels, labels

    @override
    def examples(self, batch: dict[str, Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True)
        return [(ids[mask], labels[labels != IGNORED]) for ids, mask, labels in list(rows)[: max(count, 0)]]

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        super().test_step(batch, batch_idx, dataloader_idx)
        expected = [labels[labels != IGNORED] for labels in batch["labels"]]
        goals = self._tokenizer.batch_decode(expected, skip_special_tokens=True)
        self.rouge.update(self.write(batch["input_ids"], batch["attention_mask"]), goals)

    @override
    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        scores = self.rouge.compute()
        self.log_dict({f"test_{name}": scores[f"{name}_fmeasure"] for name in _ROUGE}, sync_dist=True)
        self.rouge.reset()

    @override
    def written(self, sequences: Tensor, prompt: Tensor) -> Tensor:
        return sequences[:, 1:]  # the first token begins every text
