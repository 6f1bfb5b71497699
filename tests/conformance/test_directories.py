"""Every method on every kind of host, through an adapter directory."""

from pathlib import Path

import pytest
import torch
from conformance.cells import Cell, perturb
from conformance.hosts import HOSTS
from snapshot import Snapshot, assert_identical
from torch import nn

from lightning_peft import Method, active_adapters, disabled, load_adapter, remove, save_adapter
from lightning_peft.core.checkpoint import adapter_state
from lightning_peft.core.method import registered_methods


def test_a_directory_brings_every_bit_back(cell: Cell, tmp_path: Path) -> None:
    model = cell.adapted()
    cell.train(model)
    save_adapter(model, tmp_path)
    base = cell.base()
    before = Snapshot(base)
    fresh = cell.base()
    load_adapter(fresh, tmp_path)
    state, expected = adapter_state(fresh), adapter_state(model)
    assert set(state) == set(expected)
    for key, tensor in expected.items():
        assert_identical(state[key], tensor, key)
    assert_identical(cell.bits(fresh.eval()), cell.bits(model.eval()))
    remove(fresh)
    before.assert_same(fresh.train(), same_tensors=False)


class Wrapper(nn.Module):
    """As a LightningModule holds its network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, nn.Parameter(torch.zeros(1))

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.network(*args, **kwargs)


@pytest.mark.parametrize("inwards", [True, False])
def test_a_directory_goes_from_a_wrapped_transformers_model_to_the_bare_one_and_back(
    transformers_cell: Cell, inwards: bool, tmp_path: Path
) -> None:
    cell = transformers_cell
    wrapped, bare = Wrapper(cell.base()), cell.base()
    trained, fresh = (wrapped, bare) if inwards else (bare, wrapped)
    cell.adapted(trained)
    perturb(trained)
    save_adapter(trained, tmp_path)
    load_adapter(fresh, tmp_path, "other")
    assert active_adapters(fresh) == ("other",)
    assert_identical(cell.bits(fresh.eval()), cell.bits(trained.eval()))
    with disabled(fresh):
        assert_identical(cell.bits(fresh), cell.bits(cell.base().eval()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "transformers_cell" in metafunc.fixturenames:
        hosts = [host for host in HOSTS if host.name in ("bert", "llama", "hf_conv1d")]
        methods = [m for m in registered_methods(Method) if m.__module__.startswith("lightning_peft.")]
        cells = [Cell(host, method) for host in hosts for method in methods]
        metafunc.parametrize(
            "transformers_cell",
            [pytest.param(c, id=f"{type(c.method).__name__}-{c.host.name}") for c in cells if not c.refusal],
        )
