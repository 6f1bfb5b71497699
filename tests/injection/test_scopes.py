"""Which adapters act for the code that is running: by thread, by task, and in a forward that is computed again."""

import asyncio
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import tiny_models
import torch
from perturbation import adapted, perturb
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import (
    LoRA,
    PrefixTuning,
    PromptTuning,
    activate,
    active,
    active_adapters,
    disabled,
    inject,
    remove,
    route,
)
from lightning_peft.errors import AdapterNameError


class Checkpointed(nn.Module):
    """Two layers of which the second is computed again in the backward pass."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if self.reentrant is None:
            return self.second(x)
        return checkpoint(self.second, x, use_reentrant=self.reentrant)


def _two(reentrant: bool | None = None) -> nn.Module:
    """A network with the active adapter "a" and another one, the same each time; both train."""
    torch.manual_seed(0)
    net = Checkpointed(reentrant)
    for name in ("a", "b"):
        adapted(net, LoRA(r=2), name)
    activate(net, "a")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".peft." in name)
    return net


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4)


def test_a_scope_is_a_matter_of_its_thread(x: Tensor) -> None:
    net = _two()
    with active(net, "b"), ThreadPoolExecutor(1) as pool:
        assert active_adapters(net) == ("b",)
        assert pool.submit(active_adapters, net).result() == ("a",)
    assert active_adapters(net) == ("a",)


def test_a_thread_that_a_task_hands_work_to_sees_the_tasks_scope() -> None:
    net = _two()

    async def ask() -> tuple[str, ...]:
        with active(net, "b"):
            return await asyncio.to_thread(active_adapters, net)

    assert asyncio.run(ask()) == ("b",)


def test_blocks_are_left_in_any_order() -> None:
    net = _two()
    first, second = active(net, "b"), disabled(net)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert active_adapters(net) == ()
    second.__exit__(None, None, None)
    assert active_adapters(net) == ("a",)


def test_activate_within_a_block_is_for_afterwards_and_for_others() -> None:
    net = _two()
    with active(net, "b"), ThreadPoolExecutor(1) as pool:
        activate(net, "a", "b")
        assert active_adapters(net) == ("b",)
        assert pool.submit(active_adapters, net).result() == ("a", "b")
    assert active_adapters(net) == ("a", "b")


def test_what_is_removed_within_a_block_is_gone() -> None:
    net = _two()
    with active(net, "b", "a"):
        remove(net, "b")
        assert active_adapters(net) == ("a",)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_scopes_of_its_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    net = _two()
    with active(net, "b"):
        twin = duplicate(net)
        assert (active_adapters(net), active_adapters(twin)) == (("b",), ("a",))
        with disabled(twin):
            assert (active_adapters(net), active_adapters(twin)) == (("b",), ())


# Computed again -----------------------------------------------------------------------------------------------------

SCOPES = {
    "default": lambda net: nullcontext(),
    "active": lambda net: active(net, "b"),
    "both": lambda net: active(net, "b", "a"),
    "disabled": lambda net: disabled(net),
    "route": lambda net: route(net, ["a", "b", None]),
}


def _gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "where", ["behind the block", "in another block", "on another thread", "beside another forward"]
)
def test_a_forward_that_is_computed_again_sees_what_it_saw(x: Tensor, scope: str, reentrant: bool, where: str) -> None:
    x.requires_grad_()  # else nothing of what is disabled could be asked for a gradient
    plain, net = _two(), _two(reentrant)
    with SCOPES[scope](plain):
        expected = _gradients(plain, plain(x).square().sum())
    with SCOPES[scope](net):
        loss = net(x).square().sum()
    if where == "behind the block":
        _same(_gradients(net, loss), expected)
    elif where == "in another block":
        with active(net, "a", "b"):
            _same(_gradients(net, loss), expected)
    elif where == "on another thread":
        with ThreadPoolExecutor(1) as pool:
            _same(pool.submit(_gradients, net, loss).result(), expected)
    else:
        with disabled(net):
            net(x)
        with active(net, "a", "b"):
            other = net(x).square().sum()
        with active(plain, "a", "b"):
            added = _gradients(plain, plain(x).square().sum())
        both = {name: expected.get(name, 0) + added.get(name, 0) for name in {**expected, **added}}
        _same(_gradients(net, loss + other), both)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activating_between_a_forward_and_its_backward_is_an_error(x: Tensor, reentrant: bool) -> None:
    net = _two(reentrant)
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
    net = _two(reentrant)
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
    net = _two(False)
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
        expected = _gradients(model, model(input_ids=ids, use_cache=False).logits.square().sum())
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda function, *args: checkpoint(
            function, *args, use_reentrant=reentrant
        )
    with route(model, names):
        loss = model(input_ids=ids, use_cache=False).logits.square().sum()
    _same(_gradients(model, loss), expected)


# Compiled -----------------------------------------------------------------------------------------------------------


def test_compiled_code_has_the_scopes_of_its_thread(x: Tensor) -> None:
    torch._dynamo.reset()
    net = _two()
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
    net = _two()
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
