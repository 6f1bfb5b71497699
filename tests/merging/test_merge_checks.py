"""Merging is all or nothing, and says what rounding has taken."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from perturbation import adapted
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import IA3, LoRA, activate, inject, merge, merged, remove, save_adapter
from lightning_peft.errors import ConfigError, NotApplicableError, NotMergeableError


def _net() -> nn.Module:
    return adapted(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), LoRA(r=2))


@pytest.mark.parametrize(
    "change",
    [
        lambda net, _: merge(net),
        lambda net, _: merged(net).__enter__(),
        lambda net, path: save_adapter(net, path / "adapter"),
        lambda net, _: activate(net, "default"),
    ],
    ids=["merge", "merged", "save_adapter", "activate"],
)
def test_a_host_that_was_replaced_is_named_before_anything_changes(
    change: Callable[[nn.Module, Path], object], tmp_path: Path
) -> None:
    net = _net()
    net[2] = nn.Linear(4, 4)
    before = Snapshot(net)
    with pytest.raises(NotApplicableError, match="'2' was replaced or taken away"):
        change(net, tmp_path)
    before.assert_same(net)
    remove(net)  # which works all the same
    assert not [name for name, _ in net.named_modules() if "peft" in name]


def test_a_compiled_host_is_still_the_same() -> None:
    net, x = _net(), torch.randn(3, 4)
    with torch.no_grad():
        expected = net(x)
        net[2] = torch.compile(net[2], backend="eager")
        activate(net, "default")
        torch.testing.assert_close(net(x), expected)


def _doubled(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def _looks(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    pass


@pytest.mark.parametrize("hook", [_doubled, _looks])
def test_a_hook_between_the_weights_and_the_adapter_is_named(hook: Callable[..., object]) -> None:
    """Unmerged it is 2 W x + B A x, merged it would be 2 (W + B A) x."""
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    net[0].register_forward_hook(hook)
    adapted(net, LoRA(r=2))
    before, expected = Snapshot(net), net(x)
    for change in (merge, lambda net: merged(net).__enter__()):
        with pytest.raises(
            NotMergeableError, match=rf"LoRA on '0'.*a hook \({hook.__name__}\) stands between.*ignore_hooks"
        ):
            change(net)
    before.assert_same(net)
    if hook is _looks:
        with merged(net, ignore_hooks=True):
            torch.testing.assert_close(net(x), expected)
        merge(net, ignore_hooks=True)
        torch.testing.assert_close(net(x), expected)


def test_a_hook_behind_the_adapter_is_no_matter() -> None:
    net, x = adapted(nn.Sequential(nn.Linear(4, 4)), LoRA(r=2)), torch.randn(3, 4)
    net[0].register_forward_hook(_doubled)
    expected = net(x)
    merge(net)
    torch.testing.assert_close(net(x), expected)


def test_a_hook_between_an_adapter_of_the_input_and_the_weights_is_named() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    net[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    adapted(net, IA3(target_modules=["0"], feedforward_modules=["0"]))
    expected = net(x)
    net[0].register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    with pytest.raises(NotMergeableError, match="stands between"):
        merge(net)
    net[0]._forward_pre_hooks.popitem()
    merge(net)
    torch.testing.assert_close(net(x), expected)


# What rounding takes ------------------------------------------------------------------------------------------------


def _small(dtype: torch.dtype, by: float) -> nn.Module:
    """A layer whose adapter changes each entry of the weight by ``by``."""
    net = nn.Sequential(nn.Linear(8, 8, bias=False)).to(dtype)
    inject(net, LoRA(r=1, alpha=1))
    with torch.no_grad():
        net[0].weight.copy_(torch.linspace(0.5, 1, 64).view(8, 8))
        net[0].peft.default.lora_A.fill_(by)
        net[0].peft.default.lora_B.fill_(1)
    return net


def test_what_16_bits_take_of_a_change_is_told_and_warned_of() -> None:
    net = _small(torch.bfloat16, 0.0007)
    weight = net[0].weight.detach().float()
    with pytest.warns(
        UserWarning, match=r"Rounding to torch.bfloat16.*of 1 merged weights.*'0.weight'.*dtype=torch.float32"
    ):
        report = merge(net)
    lost = (net[0].weight.detach().float() - (weight + 0.0007)).abs()
    (layer,) = report.layers
    assert (layer.path, layer.dtype) == ("0.weight", torch.bfloat16)
    assert layer.largest_loss == pytest.approx(float(lost.max()) / 0.0007, rel=1e-3)
    assert layer.mean_loss == pytest.approx(float(lost.mean()) / 0.0007, rel=1e-3)
    assert layer.mean_loss > 0.9
    assert report.lossy == report.layers
    for shown in ("0.weight", "bfloat16", f"{layer.mean_loss:.2%}"):
        assert shown in str(report)


def test_a_wider_dtype_for_all_of_the_model_keeps_the_change() -> None:
    net = _small(torch.bfloat16, 0.0007)
    net.register_buffer("other", torch.ones(2, dtype=torch.bfloat16))
    weight = net[0].weight.detach().float()
    report = merge(net, dtype=torch.float32)
    assert net[0].weight.dtype == net.other.dtype == torch.float32
    torch.testing.assert_close(net[0].weight, weight + 0.0007, rtol=1e-6, atol=0)
    assert report.layers[0].mean_loss < 1e-3
    assert not report.lossy


def test_a_refused_merge_casts_nothing() -> None:
    net = _small(torch.bfloat16, 0.0007)
    net[0].register_forward_hook(_doubled, prepend=True)
    with pytest.raises(NotMergeableError):
        merge(net, dtype=torch.float32)
    assert net[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_lose_next_to_nothing(dtype: torch.dtype) -> None:
    assert merge(_small(dtype, 0.01)).layers[0].largest_loss < 1e-4


@pytest.mark.parametrize("dtype", [torch.int8, "float32"])
def test_what_the_model_is_cast_to_first_is_a_floating_point_dtype(dtype: object) -> None:
    net = _net()
    before = Snapshot(net)
    with pytest.raises(ConfigError, match=r"merge: dtype must be a floating-point dtype .* not .*(int8|'float32')"):
        merge(net, dtype=dtype)  # type: ignore[arg-type]
    before.assert_same(net)
