"""Which adapters act for the code that is running: by thread, by task, and in a forward that is computed again."""

import asyncio
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from injection.recomputed import two_adapters
from torch import Tensor, nn

from lightning_peft import (
    activate,
    active,
    active_adapters,
    disabled,
    remove,
)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4)


def test_a_scope_is_a_matter_of_its_thread(x: Tensor) -> None:
    net = two_adapters()
    with active(net, "b"), ThreadPoolExecutor(1) as pool:
        assert active_adapters(net) == ("b",)
        assert pool.submit(active_adapters, net).result() == ("a",)
    assert active_adapters(net) == ("a",)


def test_a_thread_that_a_task_hands_work_to_sees_the_tasks_scope() -> None:
    net = two_adapters()

    async def ask() -> tuple[str, ...]:
        with active(net, "b"):
            return await asyncio.to_thread(active_adapters, net)

    assert asyncio.run(ask()) == ("b",)


def test_blocks_are_left_in_any_order() -> None:
    net = two_adapters()
    first, second = active(net, "b"), disabled(net)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert active_adapters(net) == ()
    second.__exit__(None, None, None)
    assert active_adapters(net) == ("a",)


def test_activate_within_a_block_is_for_afterwards_and_for_others() -> None:
    net = two_adapters()
    with active(net, "b"), ThreadPoolExecutor(1) as pool:
        activate(net, "a", "b")
        assert active_adapters(net) == ("b",)
        assert pool.submit(active_adapters, net).result() == ("a", "b")
    assert active_adapters(net) == ("a", "b")


def test_what_is_removed_within_a_block_is_gone() -> None:
    net = two_adapters()
    with active(net, "b", "a"):
        remove(net, "b")
        assert active_adapters(net) == ("a",)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_scopes_of_its_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    net = two_adapters()
    with active(net, "b"):
        twin = duplicate(net)
        assert (active_adapters(net), active_adapters(twin)) == (("b",), ("a",))
        with disabled(twin):
            assert (active_adapters(net), active_adapters(twin)) == (("b",), ())


# Compiled -----------------------------------------------------------------------------------------------------------


def test_compiled_code_has_the_scopes_of_its_thread(x: Tensor) -> None:
    torch._dynamo.reset()
    net = two_adapters()
    with torch.no_grad():
        expected = {}
        for name in ("a", "b"):
            with active(net, name):
                expected[name] = net(x)
        compiled = torch.compile(net, backend="eager", fullgraph=True)

        def run(name: str) -> Tensor:
            with torch.no_grad(), active(net, name):
                return compiled(x)

        with ThreadPoolExecutor(2) as pool:
            for _ in range(3):
                for name, output in zip("abab", pool.map(run, "abab"), strict=True):
                    torch.testing.assert_close(output, expected[name])
        torch.testing.assert_close(compiled(x), expected["a"])


def test_compiled_code_refuses_scopes_of_tasks_that_take_turns(x: Tensor) -> None:
    torch._dynamo.reset()
    net = two_adapters()
    compiled = torch.compile(net, backend="eager", fullgraph=True)

    async def run(name: str) -> None:
        with active(net, name):
            await asyncio.sleep(0)
            compiled(x)

    async def both() -> None:
        await asyncio.gather(run("a"), run("b"))

    # A mode of the thread, around both: tasks that take turns would leave it as they have not found it.
    with torch.no_grad(), pytest.raises(Exception, match="cannot tell the scopes of tasks apart"):
        asyncio.run(both())
