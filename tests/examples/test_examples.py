"""The examples run as a reader runs them: as programs of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft import disabled, load_adapter

ROOT = Path(__file__).parents[2]


def run(*command: str, timeout: int = 900, folder: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def python(*arguments: str, **options: object) -> str:
    return run(sys.executable, *arguments, **options)


def test_the_existing_project_adapts_resumes_loads_and_merges():
    shown = python("examples/existing_project.py")
    accuracies = [float(value) for value in re.findall(r"accuracy (\d\.\d+)", shown)]
    assert len(accuracies) == 5
    pretrained, adapted, resumed, loaded, merged = accuracies
    assert pretrained < 0.7
    assert min(adapted, resumed) > 0.95
    assert loaded == merged == adapted
    full, task = (int(value.replace(",", "")) for value in re.findall(r"ckpt ([\d,]+) bytes", shown))
    assert task < full / 4
    assert "a plain BarClassifier" in shown


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the configs and the demo's assets in it, to write into."""
    python("examples/assets.py")
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


@pytest.mark.slow
def test_the_demo_reaches_its_accuracy_with_a_small_file(workplace):
    config = ("--config", "configs/quickstart.yaml")
    command = os.fspath(Path(sys.executable).with_name("lightning-peft"))
    shown = run(command, "fit", *config, folder=workplace, timeout=1800)
    assert "LoRA" in shown
    checkpoint = workplace / "checkpoints/quickstart/best.ckpt"
    assert checkpoint.stat().st_size < 6e6
    state = torch.load(checkpoint, weights_only=True)
    assert all(".peft." in key for key in state["state_dict"])
    weights = workplace / "weights.ckpt"
    torch.save({key: value for key, value in state.items() if key in ("state_dict", "lightning_peft")}, weights)
    assert weights.stat().st_size < 2e6
    run(command, "test", *config, "--ckpt_path", "checkpoints/quickstart/best.ckpt", folder=workplace)
    summary = python("examples/summary.py", folder=workplace)
    assert float(re.search(r"test accuracy\s+(\d\.\d+)", summary)[1]) >= 0.88


@pytest.mark.slow
def test_the_quickstart_in_python_trains_loads_and_predicts(workplace, tmp_path, monkeypatch):
    small = tmp_path / "small"  # a third of the sentences
    small.mkdir()
    (small / "minilm").symlink_to(ROOT / ".cache/minilm")
    head, *rows = (ROOT / ".cache/movie_sentences.csv").read_text().splitlines(keepends=True)
    (small / "movie_sentences.csv").write_text("".join([head, *rows[::3]]))
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(small))
    shown = python("examples/quickstart.py", "1", folder=workplace, timeout=1200)
    assert "'label': 'positive'" in shown
    assert (workplace / "checkpoints/python/sentiment.ckpt").stat().st_size < 2e6


@pytest.mark.slow
def test_a_method_of_configs_learns_the_small_task(workplace):
    shown = python("examples/compare_methods.py", "ia3", folder=workplace, timeout=1200)
    assert float(re.search(r"^ia3 +(0\.\d+)", shown, re.MULTILINE)[1]) >= 0.8
    assert "2,000 sentences" in shown


@pytest.mark.slow
def test_three_tasks_are_served_from_one_model(workplace):
    shown = python("examples/many_tasks.py", "30", folder=workplace, timeout=1200)
    assert re.findall(r"^(\w+): LoRA, 338,690 parameters", shown, re.MULTILINE) == ["movie", "amazon", "tweets"]
    apart = [float(value) for value in re.findall(r"differ by (\S+) from the adapter alone", shown)]
    assert len(apart) == 3
    assert max(apart) < 1e-5
    small, whole = (int(value.replace(",", "")) for value in re.findall(r": ([\d,]+) bytes", shown))
    assert small * 50 < whole


@pytest.fixture
def language_model(workplace: Path) -> Path:
    """The folder of the small language model, its questions and articles beside it."""
    python("examples/assets.py", "--language-model")
    return workplace / ".cache/smollm2"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_instruction_tuned_adapter_writes_the_same_in_peft(workplace, language_model):
    shown = python("examples/instruction_tuning.py", "5", folder=workplace, timeout=1200)
    before, after = (float(value) for value in re.search(r"perplexity: (\S+) before, (\S+) after 5", shown).groups())
    assert after < 0.9 * before
    assert "Two test questions" in shown
    adapter = workplace / "checkpoints/instruction_tuning/adapter"
    ours, theirs = (AutoModelForCausalLM.from_pretrained(language_model) for _ in range(2))
    load_adapter(ours, adapter)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    chat = [{"role": "user", "content": "Who answers for safety on a building site?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = [model.eval().generate(**prompt, max_new_tokens=24, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*written)
    with disabled(ours):
        assert not torch.equal(written[0], ours.generate(**prompt, max_new_tokens=24, do_sample=False))


@pytest.mark.slow
def test_the_experiment_shows_answers_of_before_and_after(workplace, language_model):
    steps = ("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "2")
    command = os.fspath(Path(sys.executable).with_name("lightning-peft"))
    shown = run(command, "fit", "--config", "configs/experiments/instruct_smollm2.yaml", *steps, folder=workplace)
    assert "Samples before training" in shown
    assert shown.count("Samples") >= 2
    assert (workplace / "checkpoints/instruct_smollm2/best.ckpt").stat().st_size < 40e6  # with the optimizer's state


@pytest.mark.slow
def test_forgetting_is_measured_with_and_without_adapters(workplace, language_model):
    ways = ("full fine-tuning", "LoRA")
    shown = python("examples/forgetting.py", "1", *ways, folder=workplace, timeout=1200)
    change = r"\S+ → \S+ \(\S+%\)"
    for name in ways:
        assert re.search(rf"^│ {name} +│ +[\d,]+ │ +\S+ │ +{change} │ +{change} │", shown, re.MULTILINE)
