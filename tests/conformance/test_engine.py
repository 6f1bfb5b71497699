"""Gradient checkpointing, torch.compile, and the dtypes."""

from typing import Any

import pytest
import torch
from conformance.cells import Cell
from snapshot import Snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def test_non_reentrant_checkpointing_gives_the_same_gradients(cell: Cell) -> None:
    model = cell.trained()
    torch.manual_seed(3)
    expected = cell.gradients(model)
    model.zero_grad()
    before = Snapshot(model)
    torch.manual_seed(3)
    found = cell.gradients(model, cell.loss(lambda *args, **kw: checkpoint(model, *args, use_reentrant=False, **kw)))
    _assert_same(found, expected)
    before.assert_same(model)  # the recomputation is cut short by an exception: nothing of it may stay behind


def test_reentrant_checkpointing_gives_the_same_gradients(cell: Cell) -> None:
    args, kwargs = cell.host.example()
    if kwargs or not args[0].is_floating_point():
        pytest.skip("torch's reentrant checkpointing needs a floating-point input")
    model = cell.trained()
    torch.manual_seed(3)
    expected = cell.gradients(model)
    model.zero_grad()

    def run(*inputs: Tensor) -> Any:
        return checkpoint(model, inputs[0].requires_grad_(), *inputs[1:], use_reentrant=True)

    torch.manual_seed(3)
    example = tuple(x.clone() for x in args)
    output = run(*example)
    output = output if isinstance(output, Tensor) else output[0]
    found = cell.gradients(model, cell.loss(lambda *_: output))
    _assert_same(found, expected)
    assert example[0].grad is not None


def test_transformers_own_checkpointing_gives_the_same_gradients(cell: Cell) -> None:
    if not hasattr(cell.host.network(), "gradient_checkpointing_enable"):
        pytest.skip("not a transformers model")
    model = cell.trained()
    torch.manual_seed(3)
    expected = cell.gradients(model)
    model.zero_grad()
    # renamed within transformers 5
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    torch.manual_seed(3)
    _assert_same(cell.gradients(model), expected)


@pytest.mark.compat
def test_a_causal_language_model_generates_the_same_with_and_without_its_cache(cell: Cell) -> None:
    if "input_ids" not in cell.host.example()[1]:
        pytest.skip("not a language model")
    if not cell.host.network().can_generate():
        pytest.skip("not a causal language model")
    model = cell.trained().eval()
    ids = torch.tensor([[5, 9, 7]])
    cached, plain = (model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


# Where a graph breaks behind an adapter (torch compiles no LSTM). Torch silences it in a way that "error" overrules.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_gives_the_same_output_and_gradients(compiled_cell: Cell) -> None:
    cell = compiled_cell
    model = cell.trained().eval()
    expected_output = cell.run(model).detach()
    expected = cell.gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    try:
        output = cell.run(compiled)
    except torch._dynamo.exc.Unsupported:
        base = torch.compile(cell.base().eval(), backend="aot_eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported):  # else the adapter is what breaks the graph
            cell.run(base)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        output = cell.run(compiled)
    torch.testing.assert_close(output, expected_output, rtol=1e-4, atol=1e-5)
    _assert_same(cell.gradients(model, cell.loss(compiled)), expected, rtol=1e-4, atol=1e-5)


def test_adapters_stay_in_full_precision_beside_a_bf16_base(cell: Cell) -> None:
    expected = cell.run(cell.base().bfloat16().eval(), torch.bfloat16)
    model = cell.trained().eval().to(torch.bfloat16)
    _assert_half_base_full_adapter(model)
    output = cell.run(model, torch.bfloat16)
    assert output.dtype == expected.dtype == torch.bfloat16
    assert not torch.equal(output, expected)
    gradients = cell.gradients(model, cell.loss(model, torch.bfloat16))
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    cell.train(model, steps=1, dtype=torch.bfloat16)
    _assert_half_base_full_adapter(model)
    assert cell.run(model.eval(), torch.bfloat16).isfinite().all()


def test_an_adapter_injected_into_a_bf16_base_trains_in_full_precision(cell: Cell) -> None:
    model = cell.adapted(cell.base().bfloat16())
    _assert_half_base_full_adapter(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    cell.train(model, steps=2, dtype=torch.bfloat16)
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert cell.run(model.eval(), torch.bfloat16).dtype == torch.bfloat16


def test_autocast_keeps_the_bases_output_dtype_and_trains(cell: Cell) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model = cell.trained().eval()
        try:
            expected = cell.run(cell.base().eval())
        except RuntimeError as error:
            pytest.skip(f"torch cannot run the base itself under autocast here: {error}")
        output = cell.run(model)
        assert output.dtype == expected.dtype
        assert not torch.equal(output, expected)
        loss = cell.loss(model.train())
    gradients = cell.gradients(model, loss)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def test_beside_an_fp64_base_everything_is_fp64(cell: Cell) -> None:
    model = cell.adapted(cell.base().double()).eval()
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float64}
    output = cell.run(model, torch.float64)
    assert output.dtype == torch.float64
    if cell.method.starts_as_base:
        expected = cell.run(cell.base().double().eval(), torch.float64)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    cell.gradients(model, cell.loss(model, torch.float64))


def test_a_model_cast_to_fp64_computes_what_it_did(cell: Cell) -> None:
    model = cell.trained().eval()
    expected = cell.run(model)
    output = cell.run(model.double(), torch.float64)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), expected, rtol=1e-4, atol=1e-4)


def _assert_half_base_full_adapter(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        dtype = torch.float32 if ".peft." in f".{name}" else torch.bfloat16
        assert parameter.dtype == dtype, f"{name} is {parameter.dtype}"


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
