"""Training encoder-decoders to write texts for texts, with real Trainers, on tiny real models."""

from pathlib import Path

import perturbation
import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers as hf
from conformance.matrix import fitted, library_methods
from conformance.models import MODELS
from echo_texts import Echo, save_model

from lightning_peft import LoRA, PEFTCallback, PromptTuning, inject
from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.training.tasks.seq2seq import Seq2SeqLM

METHODS = {method.__name__: method for method in library_methods()}
WITHOUT_DROPOUT = {"T5": {"dropout_rate": 0.0}, "BART": {"dropout": 0.0, "attention_dropout": 0.0}}


@pytest.fixture
def t5(tmp_path: Path) -> str:
    return save_model(tmp_path / "t5", tiny_models.t5, eos_token_id=2, dropout_rate=0.0)


def test_it_learns_tests_and_predicts_from_its_adapter_checkpoint(t5, trainer, tmp_path, capsys):
    fitting = trainer(
        PEFTCallback(LoRA(r=8, target_modules="all-linear"), show=False), max_epochs=40, check_val_every_n_epoch=20
    )
    fitting.fit(Seq2SeqLM(t5, lr=1e-2, max_new_tokens=4), Echo("seq2seq"))
    assert fitting.callback_metrics["val_accuracy"] > 0.8
    assert "expected" in capsys.readouterr().out
    fitting.save_checkpoint(tmp_path / "task.ckpt")
    loaded = Seq2SeqLM.load_from_checkpoint(tmp_path / "task.ckpt")
    [metrics] = trainer().test(loaded, Echo("seq2seq"), verbose=False)
    rows = [row for batch in trainer().predict(loaded, Echo("seq2seq")) for row in batch]
    assert all(row["expected"] == row["prompt"].split()[0] for row in rows)
    assert len(rows) == 32
    assert sum(row["completion"] == row["expected"] for row in rows) > 16
    assert set(metrics) == {f"test_{name}" for name in ("loss", "accuracy", "perplexity", "rouge1", "rouge2", "rougeL")}
    written = [row["completion"].split() for row in rows]
    # Recall 1 and precision 1/n where a single word is among n.
    found = [2 / (len(words) + 1) if row["expected"] in words else 0 for row, words in zip(rows, written, strict=True)]
    assert metrics["test_rouge1"] == metrics["test_rougeL"] == pytest.approx(sum(found) / 32, rel=1e-5)
    assert metrics["test_rouge2"] == 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model", WITHOUT_DROPOUT)
def test_every_method_trains_with_the_loss_of_transformers_or_is_refused(name, model, trainer, tmp_path):
    folder = save_model(tmp_path / "model", getattr(tiny_models, model.lower()), **WITHOUT_DROPOUT[model])
    module, data = Seq2SeqLM(folder, samples=0), Echo("seq2seq")
    try:
        inject(module, fitted(METHODS[name](), MODELS[model]))
    except NotApplicableError:
        return
    perturbation.perturb(module, by=0.1)
    whole = data.seq2seq(data.rows)
    output = module.model(**whole)
    [metrics] = trainer().validate(module, data, verbose=False)
    assert metrics["val_loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    labels = whole["labels"]
    right = (output.logits.argmax(-1) == labels)[labels != -100]
    assert metrics["val_accuracy"] == pytest.approx(right.float().mean().item())
    fitting = trainer(limit_val_batches=0, max_steps=1)
    batch = data.seq2seq(data.rows[:8])
    expected = F.cross_entropy(module.model(**batch).logits.flatten(0, 1), batch["labels"].flatten())
    fitting.fit(module, data)
    torch.testing.assert_close(fitting.callback_metrics["train_loss"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", [LoRA(r=4), PromptTuning(num_virtual_tokens=3)])
def test_mixed_precision_with_checkpointing(method, t5, trainer):
    module = Seq2SeqLM(t5, lr=1e-2, gradient_checkpointing=True, max_new_tokens=3)
    inject(module, method)
    options = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 4}
    fitting = trainer(max_epochs=4, precision="bf16-mixed", **options)
    before = fitting.validate(module, Echo("seq2seq"), verbose=False)[0]["val_loss"]
    fitting.fit(module, Echo("seq2seq"))
    assert fitting.callback_metrics["val_loss"] < before


def test_samples_are_written_behind_whole_inputs(t5):
    module = Seq2SeqLM(t5, max_new_tokens=3)
    module._tokenizer = hf.AutoTokenizer.from_pretrained(t5)
    batch = Echo("seq2seq").seq2seq(Echo().rows[:4])
    [first, second] = module.examples(batch, 2)
    assert [x.tolist() for x in (*first, *second)] == [ids for row in Echo().rows[:2] for ids in row]
    assert module.examples(batch, 0) == []
    alone = [module.write(ids[None], torch.ones_like(ids)[None])[0] for ids, _ in (first, second)]
    assert [row["completion"] for row in module._complete([first, second])] == alone


def test_a_decoder_alone_is_no_model_for_it(tmp_path):
    with pytest.raises(ConfigError, match="no model to write texts with"):
        Seq2SeqLM(save_model(tmp_path / "llama"))
