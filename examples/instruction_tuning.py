"""A chat model learns a company's answers: `python examples/instruction_tuning.py [STEPS]` (five minutes).

LoRA on SmolLM2-135M-Instruct, 403 questions and answers about building in Sweden, on two CPU cores. Two test questions
are answered before and after, and the adapter is written in peft's format, for whatever serves it.
"""

import logging
import sys
from pathlib import Path

import lightning as L
import rich
from assets import faq_pairs, smollm2_dir
from lightning.pytorch.callbacks import RichProgressBar
from rich.table import Table
from rich.text import Text

from lightning_peft import LoRA, PEFTCallback, save_adapter
from lightning_peft.data import InstructionData
from lightning_peft.training.tasks.causal_lm import CausalLM
from lightning_peft.training.tasks.completions import Completion

ADAPTER = Path("checkpoints/instruction_tuning/adapter")
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}


def test(trainer: L.Trainer, model: CausalLM, data: InstructionData) -> tuple[dict[str, float], list[Completion]]:
    """Score the model on the test answers, and let it answer two of the test questions itself."""
    (scores,) = trainer.test(model, data, verbose=False)
    (answers,) = trainer.predict(model, data)
    return scores, answers


def main(steps: int) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # else each Trainer tells of its devices
    L.seed_everything(0, verbose=False)
    data = InstructionData(
        str(smollm2_dir()),
        str(faq_pairs()),
        validation_split=50,
        test_split=50,
        max_length=256,
        batch_size=8,
        eval_batch_size=2,
    )
    model = CausalLM(str(smollm2_dir()), max_new_tokens=64, lr=2e-3)
    tester = L.Trainer(**QUIET, enable_progress_bar=False, limit_predict_batches=1)
    before, first = test(tester, model, data)

    callbacks = [PEFTCallback(LoRA(r=8)), RichProgressBar()]
    trainer = L.Trainer(**QUIET, max_epochs=1, limit_train_batches=steps, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(model, data)
    after, second = test(tester, model, data)

    table = Table("question", "before", "after", "reference", title="Two test questions", show_lines=True)
    for untrained, trained in zip(first, second, strict=True):
        cells = untrained["prompt"], untrained["completion"], trained["completion"], trained["expected"]
        table.add_row(*map(Text, cells))
    rich.print(table)
    for name in ("perplexity", "accuracy"):
        print(f"test {name}: {before[f'test_{name}']:.3g} before, {after[f'test_{name}']:.3g} after {steps} steps")
    save_adapter(model, ADAPTER)
    adapter, whole = (sum(file.stat().st_size for file in path.iterdir()) for path in (ADAPTER, smollm2_dir()))
    print(f"{ADAPTER}: {adapter / 1e6:.1f} MB beside a model of {whole / 1e6:.0f} MB, in peft's format")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
