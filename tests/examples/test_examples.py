"""The examples run as a reader runs them: as programs of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
def test_the_quickstart_in_python_trains_loads_and_predicts(workplace):
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
