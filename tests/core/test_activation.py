"""Which adapters act, and which train."""

from functools import partial

import pytest
import torch
from perturbation import perturb
from placing import Place, Scale, Shift
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import LoRA, activate, active, active_adapters, disabled, inject, remove
from lightning_peft.errors import AdapterNameError, PEFTError


@pytest.fixture
def net() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3))
    inject(net, Place(adapters={"0": Scale}), "scale")
    inject(net, Place(adapters={"0": Shift}), "shift")
    return net


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3)


def _training(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.requires_grad}


def test_exactly_the_named_adapters_act_and_train(net: nn.Module, x: Tensor) -> None:
    base = nn.functional.linear(x, net[0].weight, net[0].bias)
    for names, expected in {
        (): base,
        ("scale",): 2 * base,
        ("shift",): base + 1,
        ("scale", "shift"): 2 * base + 1,
        ("shift", "scale"): 2 * (base + 1),
    }.items():
        activate(net, *names)
        torch.testing.assert_close(net(x), expected)
        assert active_adapters(net) == names
        assert {name.split(".")[2] for name in _training(net)} == set(names)


def test_within_a_block_others_act_and_what_trains_stays(net: nn.Module, x: Tensor) -> None:
    expected, training = net(x), _training(net)
    with active(net, "scale"):
        assert active_adapters(net) == ("scale",)
        assert _training(net) == training
        with disabled(net):
            assert active_adapters(net) == ()
            torch.testing.assert_close(net(x), nn.functional.linear(x, net[0].weight, net[0].bias))
        assert active_adapters(net) == ("scale",)
    assert active_adapters(net) == ("scale", "shift")
    torch.testing.assert_close(net(x), expected)


def test_an_exception_inside_a_block_restores_what_acted(net: nn.Module, x: Tensor) -> None:
    expected = net(x)
    with pytest.raises(RuntimeError, match="inside"), disabled(net):
        raise RuntimeError("inside")
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("how", [activate, lambda net, *names: active(net, *names).__enter__()])
def test_an_unknown_name_is_an_error_and_changes_nothing(net: nn.Module, how: object) -> None:
    activate(net, "shift")
    training = _training(net)
    with pytest.raises(AdapterNameError, match=r"no adapter 'scael'.*'scale', 'shift'.*Did you mean 'scale'"):
        how(net, "shift", "scael")
    assert active_adapters(net) == ("shift",)
    assert _training(net) == training


def test_an_adapter_named_twice_acts_once(net: nn.Module, x: Tensor) -> None:
    with active(net, "scale"):
        expected = net(x)
    with active(net, "scale", "scale"):
        torch.testing.assert_close(net(x), expected)


def test_a_model_without_adapters_can_be_disabled_but_not_activated(x: Tensor) -> None:
    net = nn.Linear(3, 3)
    with disabled(net):
        assert net(x).shape == (2, 3)
    assert active_adapters(net) == ()
    with pytest.raises(AdapterNameError, match="It has none"):
        activate(net, "default")


def test_removing_one_that_does_not_act_leaves_the_others(net: nn.Module, x: Tensor) -> None:
    activate(net, "scale")
    expected = net(x)
    remove(net, "shift")
    torch.testing.assert_close(net(x), expected)
    assert active_adapters(net) == ("scale",)


def test_a_new_adapter_acts_beside_those_that_act(net: nn.Module) -> None:
    activate(net, "shift")
    inject(net, Place(adapters={"0": Scale}), "third")
    assert active_adapters(net) == ("shift", "third")
    assert {name.split(".")[2] for name in _training(net)} == {"shift", "third"}


def test_an_adapter_that_is_removed_inside_a_block_does_not_come_back(net: nn.Module, x: Tensor) -> None:
    base = nn.functional.linear(x, net[0].weight, net[0].bias)
    with disabled(net):
        remove(net, "scale")
    assert active_adapters(net) == ("shift",)
    torch.testing.assert_close(net(x), base + 1)
    inject(net, Place(adapters={"0": Scale}), "scale")
    assert active_adapters(net) == ("shift", "scale")


@pytest.mark.parametrize("below_first", [True, False])
def test_a_second_injection_above_or_below_the_first_works_or_is_refused(x: Tensor, below_first: bool) -> None:
    """Each injection freezes and switches all that lies below it, so two levels must know of each other."""
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3)))
    levels = [(net[0], "0"), (net, "0.0")] if below_first else [(net, "0.0"), (net[0], "0")]
    (first, path), (second, other) = levels
    inject(first, Place(adapters={path: Scale}), "first")
    expected, before = net(x), Snapshot(net)
    try:
        inject(second, Place(adapters={other: partial(Shift, 0.0)}), "second")
    except PEFTError:
        before.assert_same(net)
        torch.testing.assert_close(net(x), expected)
        return
    assert set(active_adapters(net)) == {"first", "second"}
    assert len(_training(net)) == 2
    torch.testing.assert_close(net(x), expected)
    for name in ("first", "second"):
        activate(net, name)
        assert active_adapters(net) == (name,)
        assert [part.split(".")[3] for part in _training(net)] == [name]
        torch.testing.assert_close(net(x), expected if name == "first" else expected / 2)


def test_adapters_of_two_parts_are_switched_from_the_whole(x: Tensor) -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)))
    base = net(x)
    inject(net[0], LoRA(r=2), "left")
    inject(net[1], LoRA(r=2), "right")
    perturb(net, by=1.0)
    both = net(x)
    with active(net, "left"):
        assert not torch.allclose(net(x), both)
        assert not torch.allclose(net(x), base)
    with disabled(net):
        torch.testing.assert_close(net(x), base)
    torch.testing.assert_close(net(x), both)
