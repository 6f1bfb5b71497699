"""A language model on two processes: the gradients, losses and perplexity of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from echo_texts import save_model

TESTS = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    results, printed = [], []
    for devices in (1, 2):
        command = [sys.executable, TESTS / "language_model_runs.py", str(devices), model, tmp_path / f"{devices}.pt"]
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert not done.returncode, done.stderr[-5000:]
        results.append(torch.load(tmp_path / f"{devices}.pt", weights_only=True))
        printed.append(done.stdout.count("Samples"))
    assert set(results[0]["scores"]) == {"val_loss", "val_accuracy", "val_perplexity"}
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert printed == [2, 2]  # before the first step, and at the end
