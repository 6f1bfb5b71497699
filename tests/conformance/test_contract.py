"""`make contract` is not green about nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
METHOD = """
from dataclasses import dataclass
from lightning_peft.core.adapter import WeightAdapter
from lightning_peft.core.targeted import LayerMethod

@dataclass(frozen=True, kw_only=True)
class Own(LayerMethod):
    cannot_hold = {holds!r}
    def {build}(self, host, shared):
        return WeightAdapter()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no method: no concrete subclass"),
        (METHOD.format(build="biuld", holds={}), "has no method: no concrete subclass"),
        (METHOD.format(build="build", holds={"test_thing": "so"}), "Own.cannot_hold names no test: 'test_thing'"),
    ],
    ids=["empty", "abstract", "cannot_hold"],
)
def test_a_file_that_says_nothing_that_could_be_asked_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/conformance"]
    environment = {**os.environ, "METHOD": str(tmp_path / "own.py")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
