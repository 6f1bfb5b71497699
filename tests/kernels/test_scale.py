"""The rescaling that is written into its host's output."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from benchmarks.measuring import bytes_kept
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_peft import IA3, LoRA, inject
from lightning_peft.injection.slots import named_slots
from lightning_peft.kernels.scale import plain_scale, scale_

WIDTH, HEADS = 12, 2


class Attention(nn.Module):
    """An attention without positions, of single layers or of one."""

    def __init__(self, joint: bool = False) -> None:
        super().__init__()
        if joint:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        joint = "qkv" in self._modules
        parts = self.qkv(x).chunk(3, -1) if joint else (self.query(x), self.key(x), self.value(x))
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(-2, -3) for part in parts]
        return self.out_proj(F.scaled_dot_product_attention(*heads).transpose(-2, -3).flatten(-2))


def _adapted(joint: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.ModuleDict({"attention": Attention(joint).to(dtype)})
    inject(model, IA3())
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            nn.init.uniform_(parameter, 0.5, 1.5).data[1] = -0.8
    return model["attention"]


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
    monkeypatch.setattr("lightning_peft.kernels.scale._fits", lambda *_: False)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("scaled", [7, 3])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_first_and_second_derivatives_are_right_at_zero_too(
    shape: tuple[int, ...], scaled: int, check: Callable[..., bool]
) -> None:
    weight, scale = torch.randn(7, 5).double(), torch.randn(scaled).double()
    scale[1] = 0
    x = torch.randn(shape).double().requires_grad_()
    assert check(lambda x, scale: scale_(F.linear(x, weight), scale), (x, scale.requires_grad_()))


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, None, 1e-13),
        (torch.float32, None, 1e-5),
        (torch.bfloat16, None, 0.05),
        (torch.float16, None, 0.0),  # the plain form itself
        (torch.float32, torch.bfloat16, 0.05),
    ],
)
@pytest.mark.parametrize("joint", [False, True])
def test_it_is_the_plain_form_within_rounding(
    joint: bool, dtype: torch.dtype, autocast: torch.dtype | None, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _adapted(joint, dtype), torch.randn(2, 5, WIDTH, dtype=dtype)

    def run() -> dict[str, Tensor]:
        given = x.detach().requires_grad_()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            output = model(given)
        gradients = _gradients(model, output)
        assert given.grad is not None
        return gradients | {"x": given.grad, "output": output.detach()}

    found = run()
    _plainly(monkeypatch)
    for name, theirs in run().items():
        assert found[name].dtype == theirs.dtype
        assert (found[name] - theirs).norm() <= tolerance * theirs.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_of_zero_still_trains(dtype: torch.dtype) -> None:
    y, scale = torch.randn(64, 3, dtype=dtype), torch.tensor([0.0, 1.0, 1e-30], requires_grad=True)
    (expected,) = torch.autograd.grad(plain_scale(y, scale).float().mul(3).sum(), scale)
    output = scale_(y.clone(), scale)
    assert output[:, 0].abs().max() < 1e-12
    (found,) = torch.autograd.grad(output.float().mul(3).sum(), scale)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_the_output_is_in_the_hosts_memory_with_and_without_a_graph() -> None:
    y, scale = torch.randn(2, 4, WIDTH), torch.randn(WIDTH)
    for graph in (True, False):
        own = y.clone()
        output = scale_(own, scale.requires_grad_(graph))
        assert output.data_ptr() == own.data_ptr()
        assert output.requires_grad == graph
        torch.testing.assert_close(output, plain_scale(y, scale))


@pytest.mark.parametrize(
    ("build", "tensors"),
    [
        (lambda: tiny_models.bert(attention_probs_dropout_prob=0.0), 2),  # keys and values
        (lambda: tiny_models.gpt2(attn_pdrop=0.0), 3),  # in one layer with queries
        (lambda: tiny_models.llama(num_key_value_heads=2, use_cache=False), 1),  # values: keys are turned
    ],
    ids=["bert", "gpt2", "llama"],
)
def test_the_backward_keeps_what_the_attention_keeps_anyway(
    build: Callable[[], nn.Module], tensors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build().train(), torch.tensor([[9, 7, 12, 33, 21, 8]])
    inject(model, IA3(modules_to_save=None))
    loss = lambda: model(ids).logits.sum()  # noqa: E731
    found = bytes_kept(model, loss)
    _plainly(monkeypatch)
    layers, ones = 2, 4 * 3 * tiny_models.WIDTH if tensors == 3 else 0  # before the factors of keys
    assert bytes_kept(model, loss) - found == layers * tensors * ids.numel() * tiny_models.WIDTH * 4 + ones


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing_the_gradients_are_the_same(reentrant: bool) -> None:
    model, x = _adapted(), torch.randn(2, 6, WIDTH, requires_grad=True)
    expected = _gradients(model, model(x))
    found = _gradients(model, checkpoint(model, x, use_reentrant=reentrant))
    _assert_same(found, expected, atol=1e-6)


def test_selective_checkpointing_does_not_keep_what_is_overwritten() -> None:
    model, x = _adapted(), torch.randn(2, 6, WIDTH, requires_grad=True)
    expected = _gradients(model, model(x))
    keep = lambda *_, **__: CheckpointPolicy.MUST_SAVE  # noqa: E731
    output = checkpoint(model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep))
    _assert_same(_gradients(model, output), expected)


def test_it_compiles_exports_and_transforms_as_torchs_own_operations() -> None:
    model, x = _adapted().eval(), torch.randn(2, 6, WIDTH)
    expected, gradients = model(x).detach(), _gradients(model, model(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    _assert_same(_gradients(model, compiled(x)), gradients)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    loss = lambda values: torch.func.functional_call(model, values, (x,)).square().mean()  # noqa: E731
    _assert_same(torch.func.grad(loss)(parameters), gradients)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph_the_result_is_the_same(mode: Callable[[], Any]) -> None:
    model, x = _adapted(), torch.randn(2, 6, WIDTH)
    expected = model(x).detach()
    with mode():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("order", [("ia3", "lora"), ("lora", "ia3"), ("ia3", "other")])
def test_nothing_is_written_into_what_its_backward_reads(
    order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.ModuleDict({"attention": Attention()}), torch.randn(2, 6, WIDTH, requires_grad=True)
    for name in order:
        inject(model, LoRA(r=2, target_modules=["key", "value"]) if name == "lora" else IA3(), name)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, 1, 0.3)
    found = _gradients(model, model["attention"](x))
    _plainly(monkeypatch)
    monkeypatch.setattr("lightning_peft.kernels.low_rank._fits", lambda *_: False)
    _assert_same(found, _gradients(model, model["attention"](x)))


def test_only_outputs_that_nothing_writes_into_are_kept() -> None:
    """Kernels that turn queries and keys by their positions write into them, unseen by torch."""
    llama, bert = tiny_models.llama(), tiny_models.bert()
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    for model, method in ((llama, IA3()), (bert, IA3()), (other, IA3(target_modules=["0"]))):
        inject(model, method)
    writes = {
        path.rpartition(".")[2]: adapter.in_place
        for model in (llama, bert, other)
        for path, _, slots in named_slots(model)
        for adapter in slots.children()
        if hasattr(adapter, "in_place") and hasattr(adapter, "ia3_l")
    }
    assert writes == {"k_proj": False, "v_proj": True, "key": True, "value": True, "0": False}
    other(torch.randn(2, 3)).sum().backward()
    assert other[0].peft.default.ia3_l.grad is not None
