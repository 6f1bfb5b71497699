"""Which versions the environments of this project have.

    python .ci/versions.py lock      write lock.txt: what resolves today, for the extras demo, test and dev
    python .ci/versions.py lowest    print the lower bounds of pyproject.toml, as constraints
    python .ci/versions.py newest    print nothing: whatever resolves today

The resolver is pip. torch is in constraints.txt, and what its GPU builds alone need is left out of the lock, so that
one lock serves machines with and without a GPU.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAD = """\
# Every package that `make demo`, `make test` and `make lint` install, in the version that was tested (CPython {}).
# `make lock` makes this file: pip resolves the extras of pyproject.toml anew. torch's version is in constraints.txt.
"""
LEFT_OUT = re.compile(r"lightning-peft|torch|triton|nvidia-.*|cuda-.*")
BUILD = ("hatchling", "editables")  # what builds this package


def project() -> dict[str, Any]:
    """The table "project" of pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def resolved() -> dict[str, str]:
    """The version of each package that an installation with all extras would get today."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command = [*pip, "-c", "constraints.txt", "-e", ".[dev]", *BUILD]
    report = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout)
    found = (item["metadata"] for item in report["install"])
    return {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"] for package in found}


def lock() -> str:
    """The text of lock.txt."""
    lines = [f"{name}=={version}\n" for name, version in sorted(resolved().items()) if not LEFT_OUT.fullmatch(name)]
    return HEAD.format(".".join(map(str, sys.version_info[:2]))) + "".join(lines)


def lowest() -> str:
    """The lower bounds of what a user and the tests need; torch's is that of constraints.txt."""
    extras = project()["optional-dependencies"]
    needs = [*project()["dependencies"], *extras["demo"], *extras["serve"], *extras["test"]]
    bounds = (re.match(r"([\w-]+)(\[.*\])?>=([\d.]+)", need) for need in needs)
    return "".join(f"{bound[1]}=={bound[3]}\n" for bound in bounds if bound and bound[1] != "torch")


if __name__ == "__main__":
    if sys.argv[1] == "lock":
        (ROOT / "lock.txt").write_text(lock())
    elif sys.argv[1] == "lowest":
        print(lowest(), end="")
