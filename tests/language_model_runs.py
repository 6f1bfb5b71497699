"""A language model on one or two processes: a script, since Lightning's ``ddp`` starts it again for each process.

python language_model_runs.py DEVICES MODEL OUTPUT
"""

import sys
from typing import Any

import lightning as L
import torch
from echo_texts import Echo
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft import LoRA, inject
from lightning_peft.checkpoints.ckpt import adapter_state
from lightning_peft.training.tasks.causal_lm import CausalLM


class Dealt(Echo):
    """Rows dealt out to the processes in turn: together these see the batches that one process sees."""

    def deal(self, size: int, collate: Any) -> DataLoader:
        count, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.rows, num_replicas=count, rank=rank, shuffle=False)
        return DataLoader(self.rows, batch_size=size // count, sampler=sampler, collate_fn=collate)

    def train_dataloader(self) -> DataLoader:
        return self.deal(8, self.causal)

    def val_dataloader(self) -> DataLoader:
        return self.deal(12, self.uneven)  # the last batch is smaller

    def uneven(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        """Rows with one token to be said, or with two."""
        batch = self.causal(rows)
        batch["labels"][batch["input_ids"][:, 1] % 2 == 0, :-1] = -100
        return batch


class Plain(CausalLM):
    """Trained so that the gradients show in the parameters."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02)


def run(devices: int, model: str, output: str) -> None:
    L.seed_everything(7, verbose=False)
    module = Plain(model, max_new_tokens=2)
    inject(module, LoRA(r=2, target_modules=["q_proj", "lm_head"]))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        use_distributed_sampler=False,  # Lightning's own would shuffle
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Dealt())
    if trainer.is_global_zero:
        scores = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        torch.save({"scores": scores, "adapter": adapter_state(module)}, output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(int(sys.argv[1]), sys.argv[2], sys.argv[3])
