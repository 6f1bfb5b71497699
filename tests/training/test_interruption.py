"""Runs that are killed, with no chance to clean up, and resumed from what lies on the disk."""

import multiprocessing
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import interrupted_runs
import pytest
import torch
from interrupted_runs import Kill

from lightning_peft import load_from_checkpoint
from lightning_peft.checkpoints.checksum import checksum
from lightning_peft.training.files import read_checkpoint

KILLS, TIMEOUT = 6, 60
STEPS = interrupted_runs.EPOCHS * interrupted_runs.BATCHES

Start = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start a run in a process forked from one that has torch and Lightning imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning", "lightning_peft"])  # it finds none of the tests' modules
    processes: list[BaseProcess] = []

    def start(*args: object, **kwargs: object) -> BaseProcess:
        processes.append(context.Process(target=interrupted_runs.train, args=args, kwargs=kwargs))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def finished(process: BaseProcess, result: Path) -> str:
    """Wait for a run, and return the checksum of its final weights and optimizer states."""
    process.join(TIMEOUT)
    assert process.exitcode == 0
    final = torch.load(result, weights_only=True)
    assert final["step"] == STEPS
    return checksum(final)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("save_top_k", "chunk"),
    [pytest.param(1, 0, marks=pytest.mark.slow), *((top, chunk) for top in (1, -1) for chunk in (1, 2, 3))],
)
def test_a_killed_run_leaves_a_whole_last_checkpoint_and_resumes_bit_equal(save_top_k, chunk, start, tmp_path):
    result = tmp_path / "final.pt"
    straight = finished(start(tmp_path / "straight", save_top_k, result), result)
    chance = random.Random(f"{save_top_k} {chunk}")
    between = {"os.chmod", "open", "os.rename"}  # while a new file lies beside the one whose place it takes
    moments = ["time", "write", *sorted(between), *(["os.remove"] if save_top_k == 1 else [])]
    for number in range(KILLS):
        folder, moment = tmp_path / str(number), moments[number % len(moments)]
        after = chance.uniform(0, 0.03 if moment == "time" else 1)
        process = start(folder, save_top_k, result, Kill(chance.randint(2, STEPS - 2), moment, after))
        process.join(TIMEOUT)
        assert process.exitcode == (-signal.SIGXFSZ if moment == "write" else -signal.SIGKILL)
        assert moment == "time" or any(folder.glob(".*")) == (moment in between)
        for path in folder.glob("*.ckpt"):
            assert read_checkpoint(path)["global_step"] <= STEPS
        load_from_checkpoint(interrupted_runs.Scheduled, folder / "last.ckpt")
        shutil.copy(folder / "last.ckpt", tmp_path / "copy.ckpt")
        for ckpt_path in ("last", tmp_path / "copy.ckpt"):
            result.unlink(missing_ok=True)
            process = start(folder, save_top_k, result, ckpt_path=ckpt_path)
            assert finished(process, result) == straight, (number, ckpt_path)
            assert not any(folder.glob(".*"))  # what was half written was written over
