"""Text that goes on from a prompt, with any ``AutoModelForCausalLM``."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_peft.errors import DataError, NotApplicableError
from lightning_peft.training.modes import in_eval
from lightning_peft.training.tasks.completions import labelled_span
from lightning_peft.training.tasks.language_model import LanguageModel, check_whole_rows
from lightning_peft.training.tasks.pretrained import tensors_to_read
from lightning_peft.training.tasks.token_loss import next_tokens, without_first


class CausalLM(LanguageModel):
    """A pretrained decoder that is trained to go on from a prompt.

    A batch to train, validate or test on has ``input_ids`` and ``attention_mask`` (rows, tokens), padded at the end,
    and ``labels``: the same tokens, with -100 where nothing is to be learned (a prompt, padding). Packed rows, which
    hold several texts, come without ``attention_mask``, and with ``position_ids`` that begin anew in each text. To
    predict, rows are padded at their beginning; the batch may have lists of str, ``prompt`` and ``completion``.
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    shifted: ClassVar[bool] = True
    padding_side: ClassVar[Literal["left", "right"]] = "left"
    _apart: bool | None = None  # True if packed texts do not see each other; None until it is known

    @override
    def read(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        inputs = tensors_to_read(batch)
        positions = inputs.get("position_ids")
        if positions is not None:
            check_whole_rows(self, positions)
            self._check_apart()
        labels = without_first(batch["labels"], positions)
        return inputs, labels, next_tokens(labels)

    @override
    def examples(self, batch: dict[str, Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        for row, ids in enumerate(batch["input_ids"]):
            if len(found) >= count:
                break
            labels = batch["labels"][row]
            if "position_ids" in batch:  # of several texts the first one
                begins = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
                labels = labels[: begins[1] if len(begins) > 1 else None]
            start, end = labelled_span(labels)
            start = max(start, 1)  # a text without a prompt goes on from its first token
            if start < end:
                found.append((ids[:start], ids[start:end]))
        return found

    @override
    def written(self, sequences: Tensor, prompt: Tensor) -> Tensor:
        return sequences[:, prompt.shape[1] :]

    @override
    def write(self, input_ids: Tensor, attention_mask: Tensor) -> list[str]:
        if not bool(attention_mask[:, -1].all()):
            raise DataError(
                "Rows to predict from end in padding, and the model would go on behind that. Pad them at their "
                "beginning (padding_side='left')."
            )
        return super().write(input_ids, attention_mask)

    def _check_apart(self) -> None:
        """Raise unless the model keeps the texts of a packed row apart.

        Raises:
            NotApplicableError: it does not, as recurrent models do not.
        """
        if self._apart is None:
            self._apart = keeps_texts_apart(self.model)
        if not self._apart:
            raise NotApplicableError(
                f"{type(self.model).__name__} lets each text of a packed row see the ones before it: its attention "
                f"({self.model.config._attn_implementation!r}) pays no regard to position_ids. Give the data module "
                "packing=False."
            )


def keeps_texts_apart(model: Any) -> bool:
    """True if a text is to ``model`` what it is alone when another one stands before it, its positions from 0 on."""
    device = next(model.parameters()).device
    ids = torch.tensor([[4, 5, 1, 2, 3], [6, 7, 1, 2, 3]], device=device)
    positions = torch.tensor([[0, 1, 0, 1, 2]], device=device).expand_as(ids)
    try:
        with torch.no_grad(), in_eval(model):
            packed, alone = (
                type(model)
                .forward(model, input_ids=ids[:, cut:], position_ids=positions[:, cut:], use_cache=False)
                .logits
                for cut in (0, 2)
            )
    except TypeError:  # it knows no positions
        return False
    # Rounding alone moves the logits of a large model by a thousandth of what another text would.
    tolerance = max(1e-3, 4 * torch.finfo(packed.dtype).eps) * float(alone.abs().max())
    return bool(torch.allclose(packed[:, 2:], alone, rtol=0, atol=tolerance))
