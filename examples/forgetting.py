"""What tuning on a narrow task costs elsewhere: `python examples/forgetting.py [STEPS [WAY ...]]` (15 minutes).

SmolLM2-135M-Instruct learns 403 questions and answers about building in Sweden, whole, with LoRA, and with prompt
tuning, for as many steps each, on two CPU cores. What is gained is the perplexity of other such answers; what is lost,
that of Wikipedia articles.
"""

import logging
import sys

import lightning as L
from assets import faq_pairs, smollm2_dir, wiki_texts
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table

from lightning_peft import LoRA, PEFTCallback, PromptTuning
from lightning_peft.core.method import Method
from lightning_peft.data import InstructionData, TextData
from lightning_peft.training.forgetting import ForgettingMonitor
from lightning_peft.training.tasks.causal_lm import CausalLM

# The best on the task of these learning rates: 5e-5, 1e-4, 2e-4; 1e-3, 2e-3; 1e-2, 3e-2.
WAYS: dict[str, tuple[Method | None, float]] = {
    "full fine-tuning": (None, 2e-4),
    "LoRA": (LoRA(r=8), 2e-3),
    "prompt tuning": (PromptTuning(num_virtual_tokens=20), 3e-2),
}
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}


def tune(method: Method | None, lr: float, steps: int, task: InstructionData) -> tuple[int, float, float, float]:
    """Train one way; return how much trained, the task's perplexity, and that of the articles before and after."""
    L.seed_everything(0, verbose=False)
    articles = TextData(task.tokenizer, str(wiki_texts()), max_length=256, batch_size=4)
    monitor = ForgettingMonitor(articles, max_batches=5)
    model = CausalLM(task.tokenizer, samples=0, lr=lr)
    callbacks = [PEFTCallback(method, show=False), monitor, RichProgressBar()]
    trainer = L.Trainer(**QUIET, max_epochs=1, limit_train_batches=steps, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(model, task)
    first, last = monitor.scores[0], monitor.scores[-1]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, perplexity(model, task), first.base_perplexity or first.perplexity, last.perplexity


def perplexity(model: CausalLM, task: InstructionData) -> float:
    """That of the test answers."""
    tester = L.Trainer(**QUIET, enable_progress_bar=False)
    return tester.test(model, task, verbose=False)[0]["test_perplexity"]


def change(before: float, after: float) -> str:
    return f"{before:.1f} → {after:.1f} ({after / before - 1:+.0%})"


def main(steps: int, ways: list[str]) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # else each Trainer tells of its devices
    task = InstructionData(
        str(smollm2_dir()), str(faq_pairs()), validation_split=50, test_split=50, max_length=256, batch_size=8
    )
    table = Table("", title=f"Perplexity before and after {steps} steps")
    for column in ("trained", "lr", "task", "articles"):
        table.add_column(column, justify="right", no_wrap=True)
    untrained = perplexity(CausalLM(task.tokenizer), task)
    for name in ways:
        method, lr = WAYS[name]
        trained, tuned, general, left = tune(method, lr, steps, task)
        table.add_row(name, f"{trained:,}", f"{lr:g}", change(untrained, tuned), change(general, left))
    Console(width=110).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40, sys.argv[2:] or list(WAYS))
