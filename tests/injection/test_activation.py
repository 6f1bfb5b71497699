"""Which adapters act, and which train."""

import re
from dataclasses import replace
from functools import partial

import pytest
import tiny_models
import torch
from perturbation import perturb
from placing import Place, Scale, Shift
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    AdapterInfo,
    BitFit,
    LayerNormTuning,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    SelectiveTuning,
    activate,
    active,
    active_adapters,
    adapters,
    disabled,
    inject,
    remove,
    rename,
    route,
)
from lightning_peft.checkpoints.ckpt import adapter_state
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


def test_switching_writes_into_no_tensor_and_replaces_none() -> None:
    net = tiny_models.llama()
    methods = {
        "lora": LoRA(r=2),
        "ia3": IA3(),
        "prompt": PromptTuning(num_virtual_tokens=2),
        "norms": LayerNormTuning(),
    }
    for name, method in methods.items():
        inject(net, method, name)
    everything = [*net.named_parameters(), *net.named_buffers()]
    before = [(name, id(tensor), tensor._version, tensor.data_ptr()) for name, tensor in everything]
    for name in methods:
        activate(net, name)
        with active(net, "lora", "ia3"), disabled(net):
            pass
        with route(net, [name, None]):
            pass
    everything = [*net.named_parameters(), *net.named_buffers()]
    assert [(name, id(tensor), tensor._version, tensor.data_ptr()) for name, tensor in everything] == before


def test_a_listing_has_every_adapter_with_what_it_is() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)))
    lora, probe = LoRA(r=2, modules_to_save=None), BitFit()
    assert adapters(net) == ()
    inject(net[0], lora, "first")
    inject(net[0], probe, "second")
    inject(net[1], lora, "third")
    activate(net, "third", "second")
    assert adapters(net) == (
        AdapterInfo("first", lora, False, 12),
        AdapterInfo("second", probe, True, 3),
        AdapterInfo("third", lora, True, 12),
    )
    assert [info.name for info in adapters(net[1])] == ["third"]


def test_in_a_listing_what_tied_layers_share_counts_once() -> None:
    net = tiny_models.llama()
    inject(net, SelectiveTuning(token_ids=[1, 2]), "rows")
    assert [info.parameters for info in adapters(net)] == [2 * tiny_models.WIDTH]


@pytest.mark.parametrize("method", [LoRA(r=2), PrefixTuning(num_virtual_tokens=2), BitFit(), PromptTuning()], ids=str)
def test_a_renamed_adapter_is_the_same_under_another_name(method: Method) -> None:
    net, ids = tiny_models.bert(), torch.randint(3, 40, (2, 5))
    method = replace(method, num_virtual_tokens=2) if hasattr(method, "num_virtual_tokens") else method
    for name in ("a", "b", "c"):
        inject(net, method, name)
        perturb(net, name)
    net.eval()
    activate(net, "c", "b")
    with torch.no_grad():
        acting, before = net(ids).logits, {name: (id(p), p._version) for name, p in net.named_parameters()}
        order, state = list(net.state_dict()), adapter_state(net)
        rename(net, "b", "new")
        assert torch.equal(net(ids).logits, acting)
        assert active_adapters(net) == ("c", "new")
        assert [info.name for info in adapters(net)] == ["a", "new", "c"]
        assert list(net.state_dict()) == [_renamed(key) for key in order]
        assert {_renamed(name): ids for name, ids in before.items()} == {
            name: (id(p), p._version) for name, p in net.named_parameters()
        }
        assert list(adapter_state(net)) == [_renamed(key) for key in state]
        with active(net, "new"):
            alone = net(ids).logits
        with route(net, ["new", None]):
            torch.testing.assert_close(net(ids).logits[0], alone[0], rtol=1e-5, atol=1e-6)
    remove(net, "new")
    assert not any("new" in key for key in net.state_dict())


def _renamed(key: str) -> str:
    return re.sub(r"\bpeft\.b\b", "peft.new", key)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("scael", "x", "no adapter 'scael'.*Did you mean 'scale'"),
        ("scale", "shift", "There is an adapter 'shift' already"),
        ("scale", "scale", "There is an adapter 'scale' already"),
        ("scale", "a.b", "cannot be the name"),
        ("scale", "forward", "cannot be the name"),
    ],
)
def test_a_name_that_cannot_be_given_is_refused(net: nn.Module, old: str, new: str, message: str) -> None:
    before = Snapshot(net)
    with pytest.raises(AdapterNameError, match=message):
        rename(net, old, new)
    before.assert_same(net)
