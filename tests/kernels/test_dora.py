"""The rescaled low-rank update that is written into its host's output."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from lightning_peft import DoRA, inject
from lightning_peft.kernels.dora import plain_rescaled, rescaled_update
from lightning_peft.network.layouts import Layout

IN, OUT, R, SCALE = 12, 10, 3, 0.7
SMALL = (4, 3, 2)  # of IN, OUT and R: differences take as many runs as there are numbers
LAYOUT = Layout(OUT, IN)
NAMES = ("weight", "bias", "a", "b", "m")

INPUTS: dict[str, Callable[[int], Tensor]] = {
    "vector": lambda width: torch.randn(width),
    "rows": lambda width: torch.randn(3, width),
    "batch": lambda width: torch.randn(2, 2, width),
    "not contiguous": lambda width: torch.randn(2, width, 2).transpose(1, 2),
}


class Projections(nn.Module):
    """Three layers that read the same tensor, one of them without a bias."""

    def __init__(self, width: int = IN) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).tanh() * self.k(x) + self.v(x)


def _adapted(model: nn.Module, **fields: Any) -> nn.Module:
    inject(model, DoRA(**{"r": R, "target_modules": ".*", **fields}))
    for path, parameter in model.named_parameters():
        if "lora_B" in path or "magnitude" in path:
            with torch.no_grad():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _tensors(wide: int = IN, out: int = OUT, r: int = R) -> dict[str, Tensor]:
    shapes = {"weight": (out, wide), "bias": (out,), "a": (r, wide), "b": (out, r), "m": (out,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on everything is computed by torch's own operations."""
    monkeypatch.setattr("lightning_peft.kernels.low_rank._fits", lambda *_: False)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", INPUTS)
def test_first_and_second_derivatives_are_right_with_a_constant_norm(
    name: str, dropout: float, with_bias: bool, check: Callable[..., bool]
) -> None:
    wide, out, _ = SMALL
    given = {key: tensor.double() for key, tensor in _tensors(*SMALL).items()}
    bias, norm = given.pop("bias") if with_bias else None, torch.rand(out).double() + 0.5

    def run(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
        torch.manual_seed(7)  # the same features are dropped each time
        return rescaled_update(Layout(out, wide), x, F.linear(x, weight, bias), a, b, m, norm, bias, SCALE, dropout)

    x = INPUTS[name](wide).double().detach().requires_grad_()
    assert check(run, (x, *(given[key].requires_grad_() for key in ("weight", "a", "b", "m"))))


@pytest.mark.parametrize("trained", ["x", "a b m", "m", "b", "a", "x b m", "x a", "x m", "bias a b m"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(trained: str) -> None:
    tensors, norm = {**_tensors(), "x": torch.randn(4, IN)}, torch.rand(OUT) + 0.5
    for name in trained.split():
        tensors[name].requires_grad_()

    def run(update: Callable[..., Tensor]) -> Tensor:
        x, weight, bias, a, b, m = (tensors[name] for name in ("x", *NAMES))
        return update(LAYOUT, x, F.linear(x, weight, bias), a, b, m, norm, bias, SCALE, 0.0)

    found, expected = run(rescaled_update), run(plain_rescaled)
    torch.testing.assert_close(found, expected)
    inputs, weights = [tensors[name] for name in trained.split()], torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(output, inputs, weights) for output in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-13),
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 0.05),  # a number is good to 0.004 of itself, and a dozen roundings follow each other
        (torch.float16, False, 0.005),
        (torch.float32, True, 0.05),
    ],
)
@pytest.mark.parametrize("name", INPUTS)
def test_it_is_the_plain_form_within_rounding(
    name: str, dtype: torch.dtype, autocast: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _adapted(Projections().to(dtype)), INPUTS[name](IN).to(dtype)

    def run() -> tuple[Tensor, ...]:
        given = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(given)
        gradients = _gradients(model, output)
        assert given.grad is not None
        assert {g.dtype for g in gradients.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
        return output.detach(), given.grad, *gradients.values()

    found = run()
    _plainly(monkeypatch)
    for ours, theirs in zip(found, run(), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("trained", ["", "a b", "a b m"])
def test_the_result_is_in_the_hosts_memory_unless_a_gradient_wants_that(trained: str) -> None:
    given, x, norm = _tensors(), torch.randn(2, 4, IN), torch.rand(OUT) + 0.5
    weight, bias, *factors = given.values()
    y = F.linear(x, weight, bias)
    expected = plain_rescaled(LAYOUT, x, y, *factors, norm, bias, SCALE, 0.0)
    for name in trained.split():
        given[name].requires_grad_()
    output = rescaled_update(LAYOUT, x, y, *factors, norm, bias, SCALE, 0.0)
    assert (output.data_ptr() == y.data_ptr()) == ("m" not in trained)
    assert output.requires_grad == bool(trained)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("behind", [lambda: nn.ReLU(inplace=True), nn.Tanh])
def test_what_is_behind_the_host_may_write_into_its_output(
    behind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _adapted(nn.Sequential(nn.Linear(IN, IN), behind(), nn.Linear(IN, OUT))), torch.randn(6, IN)
    found = _gradients(model, model(x))
    _plainly(monkeypatch)
    torch.testing.assert_close(found, _gradients(model, model(x)))


def test_a_magnitude_of_zero_gets_its_gradient() -> None:
    model, x = _adapted(nn.Sequential(nn.Linear(IN, OUT))), torch.randn(6, IN)
    with torch.no_grad():
        model[0].peft.default.lora_magnitude_vector[:3] = 0
    model(x).sum().backward()
    gradient = model[0].peft.default.lora_magnitude_vector.grad
    assert gradient.isfinite().all()
    assert gradient[:3].abs().min() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_backward_keeps_the_shared_input_once_and_each_output(dropout: float) -> None:
    width, rows, r = 256, 64, 8
    model = _adapted(Projections(width).bfloat16(), r=r, dropout=dropout)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = torch.randn(4, rows // 4, width, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = [layer(x) for layer in (model.q, model.k, model.v)]
    norms = 4 * width  # (out,) in fp32
    assert sum(kept.values()) == 2 * rows * width + 3 * (2 * rows * (r + width) + norms)
    sum(outputs).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_drops_the_same_features_again(reentrant: bool) -> None:
    model = _adapted(nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, IN)), dropout=0.5)
    x = torch.randn(6, IN, requires_grad=True)
    torch.manual_seed(3)
    expected = _gradients(model, model(x))
    torch.manual_seed(3)
    found = _gradients(model, checkpoint(model, x, use_reentrant=reentrant))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_it_compiles_and_exports_as_one_graph() -> None:
    model, x = _adapted(Projections()).eval(), torch.randn(6, IN)
    expected, gradients = model(x).detach(), _gradients(model, model(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(_gradients(model, compiled(x)), gradients)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_it_follows_torchs_function_transforms() -> None:
    model, x = _adapted(Projections()), torch.randn(6, IN)
    expected = _gradients(model, model(x))
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], rows: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (rows,)).square().mean()

    torch.testing.assert_close(torch.func.grad(loss)(parameters, x), expected)
    by_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    torch.testing.assert_close({name: g.mean(0) for name, g in by_row.items()}, expected)


def test_a_copy_computes_with_its_own_parameters() -> None:
    model, x = _adapted(Projections()), torch.randn(6, IN)
    expected, twin = model(x).detach(), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():  # those of the base too, whose norms count
            parameter.mul_(2)
    assert not torch.allclose(twin(x), expected)
    assert torch.equal(model(x), expected)
