"""The low-rank update that is written into its host's output."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_peft import LoRA, inject
from lightning_peft.kernels.low_rank import plain_update, redrawn_mask, update_
from lightning_peft.network.hosts import find_hosts
from lightning_peft.network.layouts import Layout

IN, OUT, R, SCALE = 12, 10, 3, 0.7
SMALL = (4, 3, 2)  # of IN, OUT and R: differences take as many runs as there are numbers
LAYOUT = Layout(OUT, IN)

INPUTS: dict[str, Callable[[int], Tensor]] = {
    "vector": lambda width: torch.randn(width),
    "rows": lambda width: torch.randn(3, width),
    "batch": lambda width: torch.randn(2, 2, width),
    "not contiguous": lambda width: torch.randn(2, width, 2).transpose(1, 2),
}


class Projections(nn.Module):
    """Three layers that read the same tensor, as query, key and value do."""

    def __init__(self, width: int = IN) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).tanh() * self.k(x) + self.v(x)


def _adapted(model: nn.Module, *names: str, **fields: Any) -> nn.Module:
    for name in names or ("default",):
        inject(model, LoRA(**{"r": R, "target_modules": ".*", **fields}), name)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.3)
    return model


def _factors(wide: int = IN, out: int = OUT, r: int = R) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight and bias of a host, A and B."""
    return torch.randn(out, wide), torch.randn(out), torch.randn(r, wide), torch.randn(out, r)


def _gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def _plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on everything is computed by torch's own operations."""
    monkeypatch.setattr("lightning_peft.kernels.low_rank._fits", lambda *_: False)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", INPUTS)
def test_first_and_second_derivatives_are_right(name: str, dropout: float, check: Callable[..., bool]) -> None:
    wide, out, _ = SMALL

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        torch.manual_seed(7)  # the same features are dropped each time
        weight, bias, a, b = factors
        return update_(Layout(out, wide), x, F.linear(x, weight, bias), a, b, SCALE, dropout)

    x = INPUTS[name](wide).double().detach().requires_grad_()
    assert check(run, (x, *(factor.double().requires_grad_() for factor in _factors(*SMALL))))


@pytest.mark.parametrize("trained", ["x", "a b", "b", "a", "x b", "x a"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(trained: str) -> None:
    tensors = dict(zip(("weight", "bias", "a", "b", "x"), (*_factors(), torch.randn(4, IN)), strict=True))
    for name in trained.split():
        tensors[name].requires_grad_()

    def run(update: Callable[..., Tensor]) -> Tensor:
        y = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
        return update(LAYOUT, tensors["x"], y, tensors["a"], tensors["b"], SCALE, 0.0)

    found, expected = run(update_), run(plain_update)
    torch.testing.assert_close(found, expected)
    inputs = [tensors[name] for name in trained.split()]
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        *(torch.autograd.grad(output, inputs, weights) for output in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-13),
        (torch.float32, False, 1e-5),
        (
            torch.bfloat16,
            False,
            0.05,
        ),  # each number is good to 0.004 of itself, and a dozen roundings follow each other
        (torch.float16, False, 0.003),
        (torch.float32, True, 0.05),
    ],
)
@pytest.mark.parametrize("name", INPUTS)
def test_it_is_the_plain_form_within_rounding(
    name: str, dtype: torch.dtype, autocast: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _adapted(Projections().to(dtype)), INPUTS[name](IN).to(dtype)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        given = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(given)
        gradients = _gradients(model, output)
        assert given.grad is not None
        return output.detach(), gradients | {"x": given.grad}

    found, gradients = run()
    _plainly(monkeypatch)
    expected, expected_gradients = run()
    assert found.dtype == expected.dtype
    assert {g.dtype for n, g in gradients.items() if n != "x"} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    for ours, theirs in zip((found, *gradients.values()), (expected, *expected_gradients.values()), strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_the_output_is_in_the_hosts_memory() -> None:
    x, (weight, bias, a, b) = torch.randn(2, 4, IN), _factors()
    y = F.linear(x, weight, bias)
    expected = plain_update(LAYOUT, x, y, a, b, SCALE, 0.0)
    for graph in (True, False):
        own = y.clone()
        output = update_(LAYOUT, x, own, a.requires_grad_(graph), b, SCALE, 0.0)
        assert output.data_ptr() == own.data_ptr()
        assert output.requires_grad == graph
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_backward_keeps_the_shared_input_once_and_no_mask(autocast: bool, dropout: float) -> None:
    width, rows, r = 256, 64, 8
    model = Projections(width).to(torch.float32 if autocast else torch.bfloat16)
    _adapted(model, r=r, dropout=dropout)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = torch.randn(4, rows // 4, width, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=autocast):
        outputs = [layer(x) for layer in (model.q, model.k, model.v)]
    assert sum(kept.values()) == 2 * rows * width + 3 * 2 * rows * r + _casts(autocast, model)
    assert (2 * rows * width + 3 * 2 * rows * r) / x.numel() <= 2.2
    sum(outputs).sum().backward()
    assert x.grad is not None


def _casts(autocast: bool, model: nn.Module) -> int:
    """Bytes of the base's weights in bf16, which autocast makes of fp32 weights and the base's backward keeps."""
    return sum(layer.weight.numel() * 2 for layer in (model.q, model.k, model.v)) if autocast else 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_drops_the_same_features_again(reentrant: bool) -> None:
    model = _adapted(nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, IN)), dropout=0.5)
    x = torch.randn(6, IN, requires_grad=True)
    torch.manual_seed(3)
    expected = _gradients(model, model(x))
    following = torch.rand(4)
    torch.manual_seed(3)
    found = _gradients(model, checkpoint(model, x, use_reentrant=reentrant))
    _assert_same(found, expected, atol=1e-6)
    assert torch.equal(torch.rand(4), following), "the stream of random numbers goes on as without checkpointing"


def test_selective_checkpointing_does_not_keep_what_is_overwritten() -> None:
    model = _adapted(Projections())
    x = torch.randn(6, IN, requires_grad=True)
    expected = _gradients(model, model(x))
    keep = lambda *_, **__: CheckpointPolicy.MUST_SAVE  # noqa: E731
    output = checkpoint(model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep))
    _assert_same(_gradients(model, output), expected)


def test_two_adapters_write_into_one_output(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _adapted(Projections(), "one", "two"), torch.randn(6, IN, requires_grad=True)
    found, gradients = model(x).detach(), _gradients(model, model(x))
    _plainly(monkeypatch)
    torch.testing.assert_close(found, model(x))
    _assert_same(gradients, _gradients(model, model(x)))


def test_a_copy_computes_with_its_own_factors() -> None:
    model, x = _adapted(Projections()), torch.randn(6, IN)
    expected, twin = model(x).detach(), copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    _gradients(twin, twin(x))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph_the_result_is_the_same(mode: Callable[[], Any]) -> None:
    model, x = _adapted(Projections(), dropout=0.3), torch.randn(6, IN)
    torch.manual_seed(1)
    expected = model(x).detach()
    torch.manual_seed(1)
    with mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_it_compiles_and_exports_as_one_graph() -> None:
    model, x = _adapted(Projections()).eval(), torch.randn(6, IN)
    expected = model(x).detach()
    gradients = _gradients(model, model(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    _assert_same(_gradients(model, compiled(x)), gradients)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_it_follows_torchs_function_transforms() -> None:
    model, x = _adapted(Projections()), torch.randn(6, IN)
    expected = _gradients(model, model(x))
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], rows: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (rows,)).square().mean()

    _assert_same(torch.func.grad(loss)(parameters, x), expected)
    by_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    _assert_same({name: g.mean(0) for name, g in by_row.items()}, expected)
    given = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    loss(given, x).backward()
    _assert_same({name: p.grad for name, p in given.items()}, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use of it
def test_it_has_directional_derivatives() -> None:
    model, x, along = _adapted(Projections()), torch.randn(6, IN), torch.randn(6, IN)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, along))).tangent
    expected = torch.autograd.functional.jvp(model, x, along)[1]
    torch.testing.assert_close(found, expected)


class Activated(nn.Linear):
    """Returns what the backward of its activation reads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def _watched(host: nn.Linear) -> nn.Linear:
    host.seen = []
    host.register_forward_hook(lambda module, args, output: module.seen.append(output))
    return host


def _patched(host: nn.Linear) -> nn.Linear:
    forward = host.forward
    host.forward = lambda x: forward(x).tanh()  # type: ignore[method-assign]
    return host


@pytest.mark.parametrize(
    "build",
    [
        lambda: Activated(IN, IN),
        lambda: _watched(nn.Linear(IN, IN)),
        lambda: _patched(nn.Linear(IN, IN)),
    ],
    ids=["saved output", "hook before ours", "patched forward"],
)
def test_an_output_that_something_else_reads_is_left_alone(
    build: Callable[[], nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _adapted(nn.Sequential(build()))
    x = torch.randn(6, IN, requires_grad=True)
    before = x.detach().clone()

    def run() -> tuple[Tensor, dict[str, Tensor], Tensor]:
        x.grad = None
        output = model(x)
        gradients = _gradients(model, output)
        return output.detach(), gradients, x.grad

    found, gradients, dx = run()
    assert torch.equal(x, before)
    for output in getattr(model[0], "seen", []):
        assert torch.equal(output, F.linear(x, model[0].weight, model[0].bias))
    _plainly(monkeypatch)
    expected, expected_gradients, expected_dx = run()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dx, expected_dx)
    _assert_same(gradients, expected_gradients)


def test_a_backward_that_kept_the_output_says_so() -> None:
    """Nothing in this library calls it so; a wrong gradient in silence would be worse than an error."""
    x, (weight, bias, a, b) = torch.randn(4, IN, requires_grad=True), _factors()
    y = F.linear(x, weight, bias).tanh()
    output = update_(LAYOUT, x, y, a.requires_grad_(), b, SCALE, 0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_product_of_matrices_alone_makes_a_fresh_output() -> None:
    model = nn.ModuleDict(
        {"linear": nn.Linear(4, 4), "own": Activated(4, 4), "conv": nn.Conv1d(4, 4, 1), "table": nn.Embedding(4, 4)}
    )
    assert {host.name: host.owns_output for host in find_hosts(model)} == {
        "linear": True,
        "own": False,
        "conv": False,
        "table": False,
    }


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.9, 0.9999999])
def test_a_mask_drops_what_it_should_wherever_and_the_same_again(dropout: float) -> None:
    shape, like = torch.Size((3, 333, 401)), torch.zeros(())
    mask = redrawn_mask(shape, like, dropout, 5)
    assert mask is not None
    assert mask.shape == (999, 401)
    assert torch.equal(mask, redrawn_mask(shape, like, dropout, 5))  # type: ignore[arg-type]
    other = redrawn_mask(shape, like, dropout, 6)
    assert other is not None
    keep = 1 - dropout
    # Within six standard deviations: of all, of each place in a draw of four, of neighbours, of two seeds.
    for found, p in [
        (mask, keep),
        *((mask.flatten()[place::4], keep) for place in range(4)),
        (mask.flatten()[1:] & mask.flatten()[:-1], keep**2),
        (mask.flatten()[4:] & mask.flatten()[:-4], keep**2),
        (mask & other, keep**2),
    ]:
        assert abs(float(found.double().mean()) - p) <= 6 * (max(p * (1 - p), 2**-16) / found.numel()) ** 0.5 + 2**-15
