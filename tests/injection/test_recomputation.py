"""A backward pass that computes a forward again sees the adapters that this saw."""

import asyncio
import copy
import pickle
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import tiny_models
import torch
from injection.recomputed import assert_same, gradients, two_adapters
from perturbation import perturb
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import LoRA, PrefixTuning, PromptTuning, activate, active, disabled, inject, route
from lightning_peft.errors import AdapterNameError


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4)


SCOPES = {
    "default": lambda net: nullcontext(),
    "active": lambda net: active(net, "b"),
    "both": lambda net: active(net, "b", "a"),
    "disabled": lambda net: disabled(net),
    "route": lambda net: route(net, ["a", "b", None]),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "where", ["behind the block", "in another block", "on another thread", "beside another forward"]
)
def test_a_forward_that_is_computed_again_sees_what_it_saw(x: Tensor, scope: str, reentrant: bool, where: str) -> None:
    x.requires_grad_()  # else nothing of what is disabled could be asked for a gradient
    plain, net = two_adapters(), two_adapters(reentrant)
    with SCOPES[scope](plain):
        expected = gradients(plain, plain(x).square().sum())
    with SCOPES[scope](net):
        loss = net(x).square().sum()
    if where == "behind the block":
        assert_same(gradients(net, loss), expected)
    elif where == "in another block":
        with active(net, "a", "b"):
            assert_same(gradients(net, loss), expected)
    elif where == "on another thread":
        with ThreadPoolExecutor(1) as pool:
            assert_same(pool.submit(gradients, net, loss).result(), expected)
    else:
        with disabled(net):
            net(x)
        with active(net, "a", "b"):
            other = net(x).square().sum()
        with active(plain, "a", "b"):
            added = gradients(plain, plain(x).square().sum())
        both = {name: expected.get(name, 0) + added.get(name, 0) for name in {**expected, **added}}
        assert_same(gradients(net, loss + other), both)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activating_between_a_forward_and_its_backward_is_an_error(x: Tensor, reentrant: bool) -> None:
    net = two_adapters(reentrant)
    net(x.requires_grad_()).sum().backward()
    loss = net(x).sum()
    activate(net, "b")
    with pytest.raises(AdapterNameError, match="other adapters were activated since"):
        loss.backward()
    net(x).sum().backward()  # the next forward is no matter
    loss = net(x).sum()
    activate(net, "b")  # as before
    loss.backward()
    loss = net(x).sum()
    with disabled(net):
        net(x)
    loss.backward()


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_it_is_one_without_checkpointing_and_from_another_thread_too(
    x: Tensor, reentrant: bool | None, elsewhere: bool
) -> None:
    net = two_adapters(reentrant)
    activate(net, "a")
    net(x.requires_grad_()).sum().backward()
    loss = net(x).sum()
    if elsewhere:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(activate, net, "b").result()
    else:
        activate(net, "b")
    with pytest.raises(AdapterNameError, match="other adapters were activated since"):
        loss.backward()
    for name in ("b", "a"):  # what is run from then on is no matter, and a copy is as free
        activate(net, name)
        for one in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            one(x).sum().backward()


def test_activating_on_one_thread_does_not_disturb_the_training_of_another(x: Tensor) -> None:
    net = two_adapters(False)
    for _ in range(50):  # so that nodes of this thread have larger numbers
        (x.requires_grad_() * 2).sum().backward()
    activate(net, "b")

    def step() -> None:
        net(x).sum().backward()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(step).result()
    step()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("other", [LoRA(r=2), PrefixTuning(num_virtual_tokens=2)])
def test_rows_that_ran_apart_are_computed_again_apart(reentrant: bool, other: LoRA | PrefixTuning) -> None:
    """The layers below a model that runs once for each prompt see some rows of the batch, then and in the backward."""
    torch.manual_seed(0)
    model, ids = tiny_models.llama(), torch.randint(1, 20, (3, 5))
    inject(model, PromptTuning(num_virtual_tokens=3), "prompt")
    inject(model, other, "other")
    perturb(model)
    model.train().enable_input_require_grads()
    names = ["prompt", "other", "other"]
    with route(model, names):
        expected = gradients(model, model(input_ids=ids, use_cache=False).logits.square().sum())
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda function, *args: checkpoint(
            function, *args, use_reentrant=reentrant
        )
    with route(model, names):
        loss = model(input_ids=ids, use_cache=False).logits.square().sum()
    assert_same(gradients(model, loss), expected)


# Threads and tasks that train at the same time ----------------------------------------------------------------------

BESIDE = {
    "in a block": lambda net, x: active(net, "a", "b"),
    "disabled": lambda net, x: disabled(net),
    "after its own training": lambda net, x: _after_training(net, x),
}


def _after_training(net: nn.Module, x: Tensor) -> AbstractContextManager[None]:
    for names in (("a", "b"), ("a",)):
        with active(net, *names):
            net(x).sum().backward()
    return nullcontext()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("beside", BESIDE)
def test_the_thread_of_the_backward_may_have_blocks_of_its_own(
    x: Tensor, scope: str, reentrant: bool, beside: str
) -> None:
    x.requires_grad_()
    plain, net = two_adapters(), two_adapters(reentrant)
    with SCOPES[scope](plain):
        expected = gradients(plain, plain(x).square().sum())
    with SCOPES[scope](net):
        loss = net(x).square().sum()

    def backward() -> dict[str, Tensor]:
        with BESIDE[beside](net, x):
            net(x)
            return gradients(net, loss)

    with ThreadPoolExecutor(1) as pool:
        assert_same(pool.submit(backward).result(), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_of_another_thread_are_no_matter_of_one_without(x: Tensor, reentrant: bool) -> None:
    x.requires_grad_()
    net = two_adapters(reentrant)
    expected = gradients(net, net(x).square().sum())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_after_training, net, x).result()
        with active(net, "b"):
            pool.submit(net, x).result()
    assert_same(gradients(net, net(x).square().sum()), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_forwards_of_two_threads_in_one_backward_are_told_apart_or_refused(x: Tensor, reentrant: bool) -> None:
    x.requires_grad_()
    net = two_adapters(reentrant)

    def loss_in(name: str) -> Tensor:
        with active(net, name):
            return net(x).square().sum()

    with ThreadPoolExecutor(1) as pool:
        loss = pool.submit(loss_in, "a").result() + loss_in("b")
    with pytest.raises(AdapterNameError, match="once for the forwards of each thread"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_tasks_that_take_turns_and_a_thread_that_gets_their_block(x: Tensor, reentrant: bool) -> None:
    x.requires_grad_()
    net = two_adapters(reentrant)
    alone = {}
    for name in ("a", "b"):
        with active(net, name):
            alone[name] = gradients(net, net(x).square().sum())

    async def train(name: str, on: Callable[..., Awaitable[Tensor]]) -> dict[str, Tensor]:
        with active(net, name):
            await asyncio.sleep(0)
            loss = await on(lambda: net(x).square().sum())
            await asyncio.sleep(0)
        net.zero_grad()
        return await on(gradients, net, loss)

    async def here(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    async def both() -> list[dict[str, Tensor]]:
        return await asyncio.gather(train("a", here), train("b", here))

    for found, name in zip(asyncio.run(both()), ("a", "b"), strict=True):
        assert_same(found, alone[name])
    for name in ("a", "b"):
        assert_same(asyncio.run(train(name, asyncio.to_thread)), alone[name])
