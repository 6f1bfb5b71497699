"""The versions that are installed are those that are locked, and the lock is one for every machine."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "lock.txt").read_text().splitlines()
LOCKED = dict(line.split("==") for line in LINES if not line.startswith("#"))
INSTALLED = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d for d in distributions()}
OWN = {"lightning-peft", "pip", "torch"}  # torch has a file of its own, and pip comes with Python


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _gpu(name: str) -> bool:
    return name == "triton" or name.startswith(("nvidia-", "cuda-"))


def test_the_lock_is_names_and_versions_alone() -> None:
    assert LINES[0].startswith("# ")
    assert "`make lock`" in LINES[1]
    for line in LINES[2:]:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+", line), line
    assert not [name for name in LOCKED if name in OWN or _gpu(name)]
    constraints = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert constraints == ["torch==2.13.0"]


def test_what_is_installed_is_what_is_locked() -> None:
    """Whatever this package and its extras need, and what that needs; other packages may stand beside it."""
    needed, pending = set(), [("lightning-peft", "dev")]
    while pending:
        name, extra = pending.pop()
        if (name, extra) in needed or name not in INSTALLED:
            continue
        needed.add((name, extra))
        for need in map(Requirement, INSTALLED[name].requires or []):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                pending += [(_name(need.name), other) for other in ("", *need.extras)]
    found = {name: INSTALLED[name].version for name, _ in needed}
    other = {name: version for name, version in found.items() if LOCKED.get(name) != version}
    strange = {name: version for name, version in other.items() if name not in OWN and not _gpu(name)}
    assert len(found) > 60
    assert not strange, "other versions than those of lock.txt: install with `make test`, or make it anew: `make lock`"
    assert found["torch"].partition("+")[0] == "2.13.0"


def test_the_demo_needs_nothing_that_only_tests_need() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needs = " ".join(extras["demo"])
    assert not [name for name in ("peft", "pytest", "mypy", "ruff", "import-linter", "pre-commit") if name in needs]
    command = ["make", "--dry-run", "--assume-new=pyproject.toml", "demo"]
    steps = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\.\[(\w+)\]", steps) == ["demo"]


def test_the_oldest_versions_are_the_bounds_of_the_project() -> None:
    printed = subprocess.run(
        [sys.executable, ".ci/versions.py", "lowest"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    oldest = dict(line.split("==") for line in printed.stdout.splitlines())
    assert {"lightning", "transformers", "torchmetrics", "datasets", "jsonargparse", "peft", "gguf"} <= oldest.keys()
    assert "torch" not in oldest


@pytest.mark.parametrize("package", ["transformers", "lightning", "torchmetrics", "datasets", "jsonargparse", "peft"])
def test_the_readmes_table_has_the_oldest_and_the_newest_version_that_were_run(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = " ".join([*project["dependencies"], *project["optional-dependencies"]["test"]])
    oldest = re.search(rf"(?<![\w-]){package}(?:\[\w+\])?>=([\d.]+)", needs)[1]
    (row,) = re.findall(rf"^\| {package} \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert row[0].startswith(oldest)
    assert row[1] == LOCKED[package]
