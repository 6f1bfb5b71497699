"""Strategies, each in processes of its own: equal results, shared files, or a refusal; never a silent difference."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed_runs
import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from snapshot import assert_identical
from torch import Tensor

from lightning_peft import load_from_checkpoint
from lightning_peft.errors import NotApplicableError
from lightning_peft.training.trainer import check_comes_back

TESTS = Path(__file__).parents[1]
TRAINED = ("project", "bert-lora", "bert-prefix", "own-bert-p-tuning")
TIMEOUT = 300


def script(strategy: str, folder: Path, *cases: str, fails: bool = False) -> str:
    """Run the cases and return what was printed; whatever happens, no process is left behind."""
    folder.mkdir(exist_ok=True)
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, TESTS / "distributed_runs.py", strategy, folder, *cases],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=TIMEOUT)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode != 0) is fails, printed[-5000:]
    return printed


def adapter(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def assert_equal_after(epoch: int, found: Path, expected: Path, cases: tuple[str, ...]) -> None:
    for case in cases:
        tensors = adapter(expected / f"{case}-epoch={epoch}.ckpt")
        assert tensors
        torch.testing.assert_close(adapter(found / f"{case}-epoch={epoch}.ckpt"), tensors, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of one process."""
    folder = tmp_path_factory.mktemp("one") / "process"
    script("one process", folder, *TRAINED)
    return folder


@pytest.mark.parametrize(
    ("strategy", "cases"),
    [
        pytest.param("ddp", TRAINED, marks=pytest.mark.slow),
        pytest.param("ddp_spawn", ("bert-prefix",), marks=pytest.mark.soak),
    ],
    ids=["ddp", "ddp_spawn"],
)
def test_two_processes_train_as_one_and_go_on_where_the_other_was(strategy, cases, alone, tmp_path):
    together = tmp_path / "together"
    script(strategy, together, *cases)
    assert_equal_after(0, together, alone, cases)
    assert_equal_after(1, together, alone, cases)

    script("one process", tmp_path / "alone_again", *(f"{case}={together / case}-epoch=0.ckpt" for case in cases))
    assert_equal_after(1, tmp_path / "alone_again", alone, cases)
    script(strategy, tmp_path / "together_again", *(f"{case}={alone / case}-epoch=0.ckpt" for case in cases[:2]))
    assert_equal_after(1, tmp_path / "together_again", alone, cases[:2])

    path = together / f"{cases[0]}-epoch=1.ckpt"
    loaded = load_from_checkpoint(distributed_runs.CASES[cases[0]].module, path).state_dict()
    for key, tensor in adapter(path).items():
        assert_identical(loaded[key], tensor, key)


@pytest.mark.soak
def test_spawned_processes_bring_back_an_adapter_that_was_there_before_and_warn_of_another(alone, tmp_path):
    printed = script("ddp_spawn", tmp_path, "project", "injected")
    assert_equal_after(1, tmp_path, alone, ("project",))
    assert printed.count("the module of the calling process has none") == 1
    assert torch.load(tmp_path / "project.pt") == {}
    trained, brought = adapter(tmp_path / "injected-epoch=1.ckpt"), torch.load(tmp_path / "injected.pt")
    assert trained.keys() == brought.keys()
    for key, tensor in trained.items():
        assert_identical(brought[key], tensor, key)


@pytest.mark.parametrize("saves", [True, False])
def test_spawned_processes_that_would_lose_all_they_trained_are_refused(saves, tmp_path):
    run = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", enable_checkpointing=saves, logger=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    check_comes_back(run)  # without a fit nothing is trained
    run.state.fn = TrainerFn.FITTING
    if saves:
        with pytest.warns(UserWarning, match=r"'spawn'.* inject\(module, method\) before fit"):
            check_comes_back(run)
    else:
        with pytest.raises(NotApplicableError, match=r"no ModelCheckpoint would keep them.* strategy='ddp'"):
            check_comes_back(run)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("strategy", "message", "unavailable"),
    [
        ("sync_batchnorm", "ConfigError: Trainer(sync_batchnorm=True) replaces", None),
        ("fsdp2", "NotApplicableError: Trainer(strategy=ModelParallelStrategy) shards parameters", None),
        ("fsdp", "NotApplicableError: Trainer(strategy=FSDPStrategy) shards parameters", "requires a GPU"),
        (
            "deepspeed",
            "NotApplicableError: Trainer(strategy=DeepSpeedStrategy) shards",
            "must have DeepSpeed installed",
        ),
    ],
    ids=["sync_batchnorm", "fsdp2", "fsdp", "deepspeed"],
)
def test_a_strategy_that_would_train_wrong_is_refused_in_every_process(strategy, message, unavailable, tmp_path):
    printed = script(strategy, tmp_path, "project", fails=True)
    if unavailable and unavailable in printed:
        pytest.skip(f"{strategy} {unavailable}")
    assert message in printed
    assert "'ddp'" in printed or "Leave it out" in printed
    assert not list(tmp_path.iterdir())
