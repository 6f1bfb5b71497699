"""The examples run as a reader runs them: as programs of their own."""

import json
import os
import random
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
# Of the language model's data: 50 questions each to validate and to test on, and 60 to train on; 20 blocks of articles.
QUESTIONS, ARTICLES, LETTERS = 160, 20, 1000


def run(*command: str, timeout: int = 900, folder: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def python(*arguments: str, **options: object) -> str:
    return run(sys.executable, *arguments, **options)


@pytest.mark.slow
def test_the_existing_project_adapts_resumes_loads_and_merges():
    shown = python("examples/existing_project.py")
    accuracies = [float(value) for value in re.findall(r"accuracy (\d\.\d+)", shown)]
    assert len(accuracies) == 5
    pretrained, adapted, resumed, loaded, merged = accuracies
    assert pretrained < 0.7
    assert min(adapted, resumed) > 0.95
    assert loaded == adapted
    assert merged == pytest.approx(adapted, abs=0.002)  # what is nearly undecided may be decided otherwise
    full, task = (int(value.replace(",", "")) for value in re.findall(r"ckpt ([\d,]+) bytes", shown))
    assert task < full / 4
    assert "a plain BarClassifier" in shown


def test_the_first_method_trains_and_merges():
    shown = python("examples/first_method.py")
    first, _, last = (float(loss) for loss in re.findall(r"loss (\d\.\d+)", shown))
    assert last < first - 0.05
    assert re.search(r"merged: the outputs differ by [0-9]e-0[678]", shown)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the configs and the demo's assets in it, to write into."""
    python("examples/assets.py")
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


@pytest.fixture
def small_workplace(workplace: Path) -> Path:
    """The same with a third of the sentences."""
    cache = own_cache(workplace, "minilm")
    head, *rows = lines(ROOT / ".cache/movie_sentences.csv")
    (cache / "movie_sentences.csv").write_text("".join([head, *rows[::3]]))
    return workplace


def own_cache(workplace: Path, model: str) -> Path:
    """Give ``workplace`` a cache that holds one of the models, and nothing else yet."""
    cache = workplace / ".cache"
    cache.unlink()
    cache.mkdir()
    (cache / model).symlink_to(ROOT / ".cache" / model)
    return cache


def lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return list(file)


@pytest.mark.parametrize(
    ("place", "accuracy"),
    [
        pytest.param("small_workplace", 0.8, marks=pytest.mark.slow),
        pytest.param("workplace", 0.88, marks=pytest.mark.soak),
    ],
)
def test_the_demo_reaches_its_accuracy_with_a_small_file(place, accuracy, request):
    workplace = request.getfixturevalue(place)
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
    assert float(re.search(r"test accuracy\s+(\d\.\d+)", summary)[1]) >= accuracy


@pytest.mark.slow
def test_the_quickstart_in_python_trains_loads_and_predicts(small_workplace):
    shown = python("examples/quickstart.py", "1", folder=small_workplace, timeout=1200)
    assert "'label': 'positive'" in shown
    assert (small_workplace / "checkpoints/python/sentiment.ckpt").stat().st_size < 2e6


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
    """The folder of the small language model; beside it are its shortest questions, and the first of its articles."""
    python("examples/assets.py", "--language-model")
    cache = own_cache(workplace, "smollm2")
    (cache / "faq").mkdir()
    for path in (ROOT / ".cache/faq").iterdir():
        shortest = sorted(lines(path), key=len)[:QUESTIONS]
        random.Random(0).shuffle(shortest)
        (cache / "faq" / path.name).write_text("".join(shortest), encoding="utf-8")
    articles = [json.loads(line) for line in lines(ROOT / ".cache/wiki_texts.jsonl")[:ARTICLES]]
    texts = [json.dumps({**article, "text": article["text"][:LETTERS]}) + "\n" for article in articles]
    (cache / "wiki_texts.jsonl").write_text("".join(texts))
    return cache / "smollm2"


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
