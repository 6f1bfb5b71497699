"""Modes that are held for a while are what they were afterwards, each module's by itself."""

import pytest
from torch import nn

from lightning_peft.training.modes import in_eval


def test_each_module_is_back_in_its_own_mode_even_after_an_error():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    net[1].eval()
    before = [module.training for module in net.modules()]
    assert len(set(before)) == 2
    with in_eval(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == before
    with pytest.raises(ZeroDivisionError), in_eval(net):
        _ = 1 / 0
    assert [module.training for module in net.modules()] == before
