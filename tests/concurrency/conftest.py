"""Every method on several kinds of host, called by several threads at once."""

import pytest
from conformance.cells import cells

SHORT = ("bert", "attention_batch_first")
"""The hosts of `make test`; on the second one adapters replace weights, and prefixes the forward."""
HOSTS = (*SHORT, "llama", "encoder", "cnn", "lstm", "own_forwards")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        served = [cell for cell in cells() if cell.host.name in HOSTS and not cell.refusal]
        metafunc.parametrize(
            "cell",
            [
                pytest.param(
                    cell,
                    id=f"{type(cell.method).__name__}-{cell.host.name}",
                    marks=() if cell.host.name in SHORT else pytest.mark.soak,
                )
                for cell in served
            ],
        )
    if "load" in metafunc.fixturenames:
        loads = [(4, 1e-6, 6), (2, 1e-6, 20), (4, None, 20), (8, 1e-6, 20), (8, None, 20)]
        metafunc.parametrize(
            "load",
            [
                pytest.param(
                    load,
                    id=f"{load[0]}-threads-{load[1]}-x{load[2]}",
                    marks=() if i == 0 else pytest.mark.soak,
                )
                for i, load in enumerate(loads)
            ],
        )
