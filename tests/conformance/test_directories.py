"""Every method on every kind of host, through an adapter directory."""

from pathlib import Path

import pytest
import torch
from conformance.cells import Cell, perturb
from snapshot import Snapshot, assert_identical
from torch import nn

from lightning_peft import active_adapters, disabled, load_adapter, remove, save_adapter
from lightning_peft.checkpoints.ckpt import adapter_state


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
