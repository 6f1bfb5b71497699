"""Scores of a language model over all tokens."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenScores(Metric):
    """Mean loss, accuracy and perplexity over tokens, of all batches and processes together."""

    full_state_update = False
    loss: Tensor
    right: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss", torch.zeros((), dtype=torch.float32), "sum")
        for name in ("right", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.long), "sum")

    def update(self, loss: Tensor, right: Tensor, count: Tensor) -> None:
        """Add the sums that :func:`~lightning_peft.training.tasks.token_loss.count_tokens` gives, each ()."""
        # Not in place: validation before the fit may have left tensors of inference mode here.
        self.loss, self.right, self.count = self.loss + loss, self.right + right, self.count + count

    def compute(self) -> dict[str, Tensor]:
        """The scores by name."""
        loss = self.loss / self.count
        return {"loss": loss, "accuracy": self.right / self.count, "perplexity": loss.exp()}
