"""What a fit has done to a language model's perplexity on other text, with real Trainers on tiny real models."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny_models
import torch
import transformers as hf
from echo_texts import WORDS, Echo, save_model
from lightning.pytorch.loggers import CSVLogger
from project import Project

from lightning_peft import LoRA, PEFTCallback
from lightning_peft.errors import ConfigError
from lightning_peft.training.forgetting import ForgettingMonitor, forgetting_table
from lightning_peft.training.tasks.causal_lm import CausalLM
from lightning_peft.training.tasks.seq2seq import Seq2SeqLM

TEXTS = [" ".join(WORDS[i : i + 3 + i % 5]) for i in range(0, 30, 3)]


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return save_model(tmp_path / "llama")


def fit(trainer: Any, module: L.LightningModule, monitor: ForgettingMonitor, **options: Any) -> L.Trainer:
    peft = PEFTCallback(LoRA(r=4), show=False)
    fitting = trainer(monitor, peft, num_sanity_val_steps=0, **options)
    fitting.fit(module, Echo())
    return fitting


def perplexity(path: str, model: Any, texts: list[str]) -> float:
    """One text at a time, by transformers' own loss."""
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        total, count = total + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return float(torch.tensor(total / count).exp())


def test_the_base_stays_and_what_is_trained_is_scored(llama, trainer, capsys):
    module, monitor = CausalLM(llama, lr=2e-2, samples=0), ForgettingMonitor(TEXTS)
    fitting = fit(trainer, module, monitor, max_epochs=2)
    assert [score.step for score in monitor.scores] == [0, 4, 8]  # four batches an epoch
    start, *_, end = monitor.scores
    base = hf.AutoModelForCausalLM.from_pretrained(llama)
    assert start.perplexity == pytest.approx(perplexity(llama, base, TEXTS), rel=1e-5)
    assert {score.base_perplexity for score in monitor.scores} == {start.perplexity}
    assert end.perplexity == pytest.approx(perplexity(llama, module.model.eval(), TEXTS), rel=1e-5)
    assert end.perplexity != start.perplexity
    assert fitting.callback_metrics["general_perplexity"] == pytest.approx(end.perplexity)
    assert fitting.callback_metrics["general_base_perplexity"] == pytest.approx(start.perplexity)
    shown = capsys.readouterr().out
    assert "Perplexity on general text" in shown
    assert f"{end.perplexity:.2f}" in shown


def test_training_is_what_it_is_without_it(llama, trainer):
    states = []
    for monitors in ([], [ForgettingMonitor(TEXTS, every_n_steps=1)]):
        L.seed_everything(1, verbose=False)
        module = CausalLM(llama, dropout=0.1, samples=0)
        trainer(*monitors, PEFTCallback(LoRA(r=4, dropout=0.3), show=False), max_epochs=1).fit(module, Echo())
        states.append({name: p for name, p in module.named_parameters() if p.requires_grad})
    assert states[0]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_it_measures_every_so_many_optimizer_steps_and_at_the_end(llama, trainer, tmp_path):
    monitor = ForgettingMonitor(TEXTS, every_n_steps=2)
    module = CausalLM(llama, samples=0)
    logger = CSVLogger(tmp_path / "logs")
    # Batches come in pairs: two steps an epoch, and the last of five is at no multiple of two.
    fit(trainer, module, monitor, max_steps=5, max_epochs=3, accumulate_grad_batches=2, logger=logger)
    assert [score.step for score in monitor.scores] == [0, 2, 4, 5]
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [row["general_perplexity"] for row in csv.DictReader(file) if row["general_perplexity"]]
    assert len(logged) == 4
    assert float(logged[0]) == pytest.approx(monitor.scores[0].perplexity)


def test_without_adapters_there_is_no_base_beside(llama, trainer):
    monitor = ForgettingMonitor(TEXTS, max_batches=1, batch_size=3)
    module = CausalLM(llama, lr=1e-2, samples=0)
    fitting = trainer(monitor, num_sanity_val_steps=0, max_epochs=1)
    fitting.fit(module, Echo())
    assert [score.base_perplexity for score in monitor.scores] == [None, None]
    assert "general_base_perplexity" not in fitting.callback_metrics
    base = hf.AutoModelForCausalLM.from_pretrained(llama)
    assert monitor.scores[0].perplexity == pytest.approx(perplexity(llama, base, TEXTS[:3]), rel=1e-5)
    assert "adapters off" in [str(column.header) for column in forgetting_table(monitor.scores).columns]


def test_a_data_module_gives_its_validation_batches(llama, trainer):
    monitor = ForgettingMonitor(data := Echo(count=11))
    fit(trainer, CausalLM(llama, samples=0), monitor, max_epochs=1)
    base = hf.AutoModelForCausalLM.from_pretrained(llama)
    [batch] = data.val_dataloader()
    with torch.no_grad():
        expected = base(**batch, use_cache=False).loss.exp()
    assert monitor.scores[0].perplexity == pytest.approx(float(expected), rel=1e-5)


def test_long_texts_are_cut(llama, trainer):
    monitor = ForgettingMonitor([" ".join(WORDS[:40])], max_length=4)
    fit(trainer, CausalLM(llama, samples=0), monitor, max_epochs=1)
    base = hf.AutoModelForCausalLM.from_pretrained(llama)
    assert monitor.scores[0].perplexity == pytest.approx(perplexity(llama, base, [" ".join(WORDS[:4])]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_steps": -1}, "every_n_steps=-1 must be at least 0"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"data": "a text"}, "not the one text 'a text'"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ConfigError, match=words):
        ForgettingMonitor(**{"data": TEXTS, **options})


def test_a_fit_without_a_causal_language_model_or_texts_is_refused(llama, trainer, tmp_path):
    with pytest.raises(ConfigError, match="Project holds none"):
        trainer(ForgettingMonitor(TEXTS)).fit(Project(), Echo())
    encoder_decoder = Seq2SeqLM(save_model(tmp_path / "t5", tiny_models.t5), samples=0)
    with pytest.raises(ConfigError, match="Seq2SeqLM holds none"):
        trainer(ForgettingMonitor(TEXTS)).fit(encoder_decoder, Echo("seq2seq"))
    with pytest.raises(ConfigError, match="nothing to score"):
        trainer(ForgettingMonitor([])).fit(CausalLM(llama, samples=0), Echo())
    module = CausalLM(llama, samples=0)
    (Path(llama) / "tokenizer.json").unlink()
    (Path(llama) / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="finds no tokenizer"):
        trainer(ForgettingMonitor(TEXTS)).fit(module, Echo())
