"""While an adapter is folded in for a while, that is a state of the model, and everybody knows it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from perturbation import adapted, perturb
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import (
    LoRA,
    activate,
    active,
    active_adapters,
    combine,
    disabled,
    eject,
    inject,
    load_adapter,
    merge,
    merged,
    remove,
    rename,
    route,
    save_adapter,
)
from lightning_peft.checkpoints.ckpt import metadata
from lightning_peft.errors import AdapterNameError


@pytest.fixture
def net() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    for name in ("a", "b"):
        adapted(net, LoRA(r=2), name)
    return net.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4)


CHANGES: dict[str, Callable[[nn.Module, Path], object]] = {
    "activate": lambda net, _: activate(net, "b"),
    "active": lambda net, _: active(net, "b").__enter__(),
    "disabled": lambda net, _: disabled(net).__enter__(),
    "route": lambda net, _: route(net, ["a", "b", None]).__enter__(),
    "rename": lambda net, _: rename(net, "b", "c"),
    "remove": lambda net, _: remove(net, "b"),
    "eject": lambda net, _: eject(net, "b"),
    "inject": lambda net, _: inject(net, LoRA(r=2), "c"),
    "merge": lambda net, _: merge(net, "b"),
    "combine": lambda net, _: combine(net, {"a": 1.0, "b": 1.0}, name="c"),
    "save_adapter": lambda net, path: save_adapter(net, path / "b", "b"),
    "load_adapter": lambda net, path: load_adapter(net, path / "b", "c"),
    "checkpoint": lambda net, _: metadata(net),
    "the same again": lambda net, _: merged(net, "a").__enter__(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_else_is_done_to_the_adapters_meanwhile(net: nn.Module, x: Tensor, change: str, tmp_path: Path) -> None:
    before, expected = Snapshot(net), net(x)
    with merged(net, "a"):
        folded = Snapshot(net)
        with pytest.raises(AdapterNameError, match="'a' is folded into the base"):
            CHANGES[change](net, tmp_path)
        folded.assert_same(net)
        torch.testing.assert_close(net(x), expected)
    assert not list(tmp_path.iterdir())
    before.assert_same(net)
    assert torch.equal(net(x), expected)


def test_further_ones_are_folded_in_and_blocks_are_left_in_any_order(net: nn.Module, x: Tensor) -> None:
    before, expected = Snapshot(net), net(x)
    first, second = merged(net, "a"), merged(net, "b")
    first.__enter__()
    second.__enter__()
    torch.testing.assert_close(net(x), expected)
    first.__exit__(None, None, None)
    with pytest.raises(AdapterNameError, match="is folded into the base"):
        activate(net, "a")
    torch.testing.assert_close(net(x), expected)
    second.__exit__(None, None, None)
    before.assert_same(net)
    assert active_adapters(net) == ("a", "b")
    assert torch.equal(net(x), expected)


def test_another_task_is_refused_and_the_base_comes_back(net: nn.Module, x: Tensor) -> None:
    before, expected, refused = Snapshot(net), net(x), []

    async def fold(name: str, first: float, then: float) -> None:
        await asyncio.sleep(first)
        try:
            with merged(net, name):
                await asyncio.sleep(then)
        except AdapterNameError as error:
            refused.append((name, str(error)))

    async def both() -> None:
        await asyncio.gather(fold("a", 0, 0.02), fold("b", 0.01, 0.02))

    asyncio.run(both())
    assert [name for name, _ in refused] == ["b"]
    assert "'a' is folded into the base now" in refused[0][1]
    before.assert_same(net)
    assert torch.equal(net(x), expected)


def test_other_threads_in_blocks_of_their_own_are_not_pulled_the_base_from_under_their_feet(net: nn.Module) -> None:
    before = Snapshot(net)
    with ThreadPoolExecutor(1) as pool:
        block = active(net, "b")
        pool.submit(block.__enter__).result()
        for change in (lambda: merged(net, "a").__enter__(), lambda: merge(net, "a")):
            with pytest.raises(AdapterNameError, match="other threads or tasks are within active"):
                change()
        pool.submit(block.__exit__, None, None, None).result()
        before.assert_same(net)
        with merged(net, "a"), pytest.raises(AdapterNameError, match="is folded into the base"):
            pool.submit(active(net, "b").__enter__).result()
    before.assert_same(net)


def test_within_a_block_of_ones_own_an_adapter_acts_once(net: nn.Module, x: Tensor) -> None:
    with active(net, "a"):
        expected = net(x)
        with merged(net, "a"):
            assert active_adapters(net) == ()
            torch.testing.assert_close(net(x), expected)
        assert torch.equal(net(x), expected)


def test_what_cannot_be_folded_in_leaves_no_state_behind(net: nn.Module) -> None:
    perturb(net, "a")
    with torch.no_grad():
        net[0].peft.a.lora_B.fill_(float("nan"))
    before = net[0].weight.clone()
    for change in (lambda: merged(net, "a").__enter__(), lambda: merge(net, "a")):
        with pytest.raises(Exception, match="not finite"):
            change()
    assert torch.equal(net[0].weight, before)
    activate(net, "b")  # it is no state of being folded
