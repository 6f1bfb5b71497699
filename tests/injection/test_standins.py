"""The forward of a host that reads other weights runs on a stand-in, whoever has put what in its place."""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import (
    BitFit,
    LoRA,
    SelectiveTuning,
    active,
    active_adapters,
    disabled,
    inject,
    merged,
    remove,
    rename,
)
from lightning_peft.errors import NotApplicableError


class Head(nn.Module):
    """Reads its weight itself, and counts its calls."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("mean", torch.zeros(3))
        self.stored = self._compute

    def _compute(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.stored(x)
        self.mean = 0.5 * self.mean + 0.5 * y.detach().mean(0)
        return y


class Net(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _doubled(net: nn.Module) -> nn.Module:
    """``net`` with a head that is fully trained, and twice what it was."""
    inject(net, LoRA(r=2, target_modules=["body"], modules_to_save=["head"]))
    with torch.no_grad():
        for name, parameter in net.head.peft.default.named_parameters():
            if name != "mean":
                parameter.mul_(2)
    return net


def _decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


class Held:
    """An object that is called, and holds what it calls."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.inner = {"calls": 0}
        self.forward = forward

    def __call__(self, *args: Any) -> Any:
        self.inner["calls"] += 1
        return self.forward(*args)


WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "closure": lambda forward: lambda x: forward(x),
    "default": lambda forward: lambda x, inner=forward: inner(x),
    "decorator": _decorated,
    "two decorators": lambda forward: _decorated(_decorated(forward)),
    "partial": functools.partial,
    "torch's decorators": lambda forward: torch.enable_grad()(torch.autocast("cpu", enabled=False)(forward)),
    "object": Held,
    "compiled": lambda forward: torch.compile(forward, backend="eager"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # asked for by Dynamo
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_forward_that_others_have_wrapped_reads_what_trains(wrapper: str, first: bool) -> None:
    torch._dynamo.reset()
    net, x = Net(Head()), torch.randn(2, 4)
    expected = 2 * net(x)
    if first:
        net.head.forward = WRAPPERS[wrapper](net.head.forward)
    untouched = Snapshot(net)
    _doubled(net)
    if not first:
        net.head.forward = WRAPPERS[wrapper](net.head.forward)
    output = net(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert net.head.peft.default.weight.grad is not None
    with disabled(net):
        torch.testing.assert_close(net(x), expected / 2)
    remove(net)
    torch.testing.assert_close(net(x), expected / 2)
    if first:
        untouched.state["head.mean"] = net.head.mean.clone()  # the forward's own state
        untouched.assert_same(net)


GLOBAL: dict[str, Any] = {}


def test_a_forward_that_cannot_be_given_other_weights_is_named_before_anything_changes() -> None:
    net = Net(Head())
    GLOBAL["forward"] = net.head.forward
    net.head.forward = lambda x: GLOBAL["forward"](x)
    before = Snapshot(net)
    with pytest.raises(NotApplicableError, match=r"forward of 'head' \(Head\) was replaced by .*not known"):
        inject(net, LoRA(r=2, target_modules=["body"], modules_to_save=["head"]))
    before.assert_same(net)


def test_a_frozen_norm_stays_in_eval_behind_any_forward() -> None:
    net = Net(nn.BatchNorm1d(4))
    GLOBAL["forward"] = net.head.forward
    net.head.forward = lambda x: GLOBAL["forward"](x)
    mean = net.head.running_mean.clone()
    inject(net, LoRA(r=2, target_modules=["body"]))
    net.train()(torch.randn(8, 4))
    assert torch.equal(net.head.running_mean, mean)
    assert net.head.training


def test_a_forward_that_is_replaced_afterwards_is_named() -> None:
    net = _doubled(Net(Head()))
    net.head.forward = lambda x: x
    with pytest.raises(NotApplicableError, match=r"forward of 'head' \(Head\) was replaced after"):
        net(torch.randn(2, 4))


def test_what_a_forward_sets_on_itself_is_kept_and_belongs_to_the_adapter_that_has_it() -> None:
    net, x = Net(Head()), torch.randn(2, 4)
    net(x)
    assert (net.head.calls, net.head.mean.abs().sum() > 0) == (1, True)
    _doubled(net)
    before = net.head.mean.clone()
    net(x)
    net(x)
    assert net.head.calls == 3
    assert torch.equal(net.head.mean, before)  # the fully trained copy has statistics of its own
    with disabled(net):
        net(x)
    assert (net.head.calls, torch.equal(net.head.mean, before)) == (4, False)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_hooks_that_make_a_weight_make_it_of_what_trains(norm: Callable[[nn.Module], nn.Module]) -> None:
    net, x = Net(norm(nn.Linear(4, 3, bias=False))).eval(), torch.randn(2, 4)
    base = net(x)
    inject(net, LoRA(r=2, target_modules=["body"], modules_to_save=["head"]))
    torch.testing.assert_close(net(x), base)
    net(x).sum().backward()
    trained = dict(net.head.peft.default.named_parameters())
    assert all(parameter.grad is not None for parameter in trained.values())
    with torch.no_grad():
        next(parameter for name, parameter in trained.items() if name in ("weight_g", "weight_orig")).mul_(2)
    if "weight_g" in trained:  # a spectral norm takes the factor out again
        torch.testing.assert_close(net(x), 2 * base)
    with disabled(net):
        torch.testing.assert_close(net(x), base)


class Pooled(nn.Module):
    """Reads what a hook of its child has kept on it."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.block = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)
        self.block.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept = output

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.token) + self.kept


class Watched(Pooled):
    """Only others read what is kept."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.token)


def test_what_a_hook_hands_to_the_forward_of_its_parent_is_not_missed_silently() -> None:
    net, x = nn.Sequential(Pooled()), torch.randn(2, 4)
    inject(net, SelectiveTuning(parameters=["token"]))
    with pytest.raises(NotApplicableError, match=r"A hook.* has set 'kept' of '0' \(Pooled\) while its forward"):
        net(x)
    net = nn.Sequential(Watched())
    expected = net(x)
    inject(net, SelectiveTuning(parameters=["token"]))
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net[0].kept, expected)


def test_a_spectral_norm_moves_once_where_only_the_bias_trains() -> None:
    plain, net = (Net(nn.utils.spectral_norm(nn.Linear(4, 3))) for _ in range(2))
    x = torch.randn(2, 4)
    net.load_state_dict(plain.state_dict())
    inject(net, BitFit(target_modules=["head"], modules_to_save=None))
    for model in (plain, net):
        model.train()(x)
    torch.testing.assert_close(net.head.weight_u, plain.head.weight_u)


# Blocks ---------------------------------------------------------------------------------------------------------------


def _switched() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(4, 4))
    for name in ("a", "b"):
        inject(net, LoRA(r=2), name)
        nn.init.normal_(net[0].peft.get_submodule(name).lora_B)
    return net, torch.randn(2, 4)


def test_a_block_within_compiled_code_leaves_the_one_around_it() -> None:
    torch._dynamo.reset()
    net, x = _switched()
    with active(net, "b"):
        adapted = net(x)
    with disabled(net):
        base = net(x)
    compiled = torch.compile(net, backend="eager")

    @torch.compile(backend="eager")
    def difference(x: Tensor) -> Tensor:
        with disabled(net):
            reference = net(x)
        return net(x) - reference

    with active(net, "b"):
        torch.testing.assert_close(difference(x), adapted - base)
        torch.testing.assert_close(compiled(x), adapted)
        torch.testing.assert_close(net(x), adapted)


def test_an_adapter_that_is_renamed_within_a_block_goes_on_acting() -> None:
    net, x = _switched()
    with active(net, "a"):
        expected = net(x)
        rename(net, "a", "c")
        assert active_adapters(net) == ("c",)
        assert torch.equal(net(x), expected)


def test_a_task_within_ones_own_block_may_fold_in() -> None:
    net, _ = _switched()

    async def fold() -> tuple[str, ...]:
        with merged(net, "a"):
            return active_adapters(net)

    with active(net, "a"):
        assert asyncio.run(fold()) == ()


def test_a_forward_in_a_callback_of_autograds_sees_the_block() -> None:
    net, x = _switched()
    seen = []

    class Callback(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: seen.append(net(x)))
            return gradient

    with active(net, "b"):
        expected = net(x)
        Callback.apply(x.clone().requires_grad_()).sum().backward()
    assert torch.equal(seen[0], expected)


def test_taking_out_what_was_adapted_in_a_part_that_is_gone_works() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    inject(net, LoRA(r=2))
    net[0] = nn.Identity()
    remove(net)
    assert not [name for name, _ in net.named_modules() if "peft" in name]
