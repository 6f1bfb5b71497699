"""DoRA against its paper, in plain torch, and against the peft package."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny_models
import torch
from methods.test_lora import HOSTS
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

from lightning_peft import (
    BitFit,
    Combine,
    DoRA,
    LoRA,
    activate,
    combine,
    inject,
    load_adapter,
    merge,
    merged,
    remove,
    save_adapter,
)
from lightning_peft.errors import ConfigError, NotApplicableError, NotMergeableError

R, ALPHA = 3, 5.0


def _adapted(model: nn.Module, **fields: Any) -> nn.Module:
    inject(model, DoRA(**{"r": R, "alpha": ALPHA, "target_modules": ".*", "modules_to_save": None, **fields}))
    return _moved(model).eval()


@torch.no_grad()
def _moved(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_((0.1 if "magnitude" in name else 0.3) * torch.randn_like(parameter))
    return model


def _run(model: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    output = model(*args)
    return output if isinstance(output, Tensor) else output[0]


def _by_the_paper(weight: Tensor, a: Tensor, b: Tensor, m: Tensor, transposed: bool) -> Tensor:
    """m (W + s B A) / ||W + s B A||, row by row, with the norm detached."""
    w = (weight.T if transposed else weight).flatten(1)
    changed = w + ALPHA / R * b @ a
    changed = m[:, None] * changed / changed.norm(dim=1, keepdim=True).detach()
    return (changed.T if transposed else changed).reshape(weight.shape)


@pytest.mark.parametrize("name", HOSTS)
def test_output_and_gradients_are_those_of_the_paper(name: str) -> None:
    build, example, slots = HOSTS[name]
    model, args = build(), example()
    base = copy.deepcopy(model).eval()
    _adapted(model)
    weights, own = {}, {}
    for path, slot in slots.items():
        adapter = model.peft.get_submodule(slot)
        own[slot] = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
        transposed = isinstance(model, (Conv1D, nn.Embedding))
        weights[path] = _by_the_paper(base.get_parameter(path).detach(), *own[slot], transposed)
    expected = torch.func.functional_call(base, weights, args)
    expected = expected if isinstance(expected, Tensor) else expected[0]
    found = _run(model, args)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for output in (found, expected):
        output.square().sum().backward()
    for slot, parameters in own.items():
        for (key, mine), other in zip(model.peft.get_submodule(slot).named_parameters(), parameters, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", HOSTS)
def test_it_starts_as_the_base_to_the_bit(name: str, dtype: torch.dtype) -> None:
    build, example, _ = HOSTS[name]
    model = build().to(dtype).eval().requires_grad_(False)  # torch has other kernels for weights that train
    args = tuple(x.to(dtype) if x.is_floating_point() else x for x in example())
    with torch.no_grad():
        expected = _run(model, args)
        inject(model, DoRA(r=R, target_modules=".*", modules_to_save=None))
        assert torch.equal(_run(model, args), expected)


def test_the_magnitude_starts_as_the_norm_of_each_outputs_weights() -> None:
    model = nn.ModuleDict(
        {"linear": nn.Linear(6, 4), "table": nn.Embedding(9, 5), "conv": nn.Conv2d(4, 6, 3, groups=2)}
    )
    inject(model, DoRA(r=2, target_modules=["linear", "table", "conv"]))
    for name, dims in (("linear", 1), ("table", 0), ("conv", (1, 2, 3))):
        norm = model[name].weight.square().sum(dims).sqrt()
        torch.testing.assert_close(model[name].peft.default.lora_magnitude_vector, norm)


def test_a_row_of_zeros_stays_one_and_harms_no_other() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    nn.init.zeros_(model[0].weight[1])
    inject(model, DoRA(r=2, target_modules=["0"], modules_to_save=None))
    x, optimizer = torch.randn(5, 6), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model(x)[:, 1], model[0].bias[1].expand(5))
    assert model[0].peft.default.lora_B[0].any()


# The norm


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
@pytest.mark.parametrize("rows", [8, 3000])  # more than are converted at once
def test_the_norm_is_that_of_the_sum_in_full_precision(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    layer = nn.Linear(700, rows).to(dtype)
    inject(layer, DoRA(r=R, target_modules=".*"))
    adapter = _moved(layer).peft.default
    weight = layer.weight.detach().double()
    expected = (weight + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()).norm(dim=1)
    assert ((adapter.norm() - expected).abs() / expected).max() < tolerance


def test_an_update_that_cancels_the_weights_leaves_the_norm_finite() -> None:
    layer = nn.Linear(8, 8)
    inject(layer, DoRA(r=8, alpha=8, target_modules=".*"))
    adapter = layer.peft.default
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(8))
        adapter.lora_B.copy_(-layer.weight)
    assert layer(torch.randn(3, 8)).isfinite().all()


def _by_merging(layer: nn.Linear) -> None:
    inject(layer, LoRA(r=2, target_modules=".*"), "other")
    activate(layer, "other")
    merge(_moved(layer), "other")


def _by_data(layer: nn.Linear) -> None:
    layer.weight.data.mul_(3)
    layer.eval()


def _by_state(layer: nn.Linear, **how: bool) -> None:
    layer.load_state_dict({**layer.state_dict(), "weight": torch.randn(7, 6)}, **how)


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "in place": lambda layer: nn.init.normal_(layer.weight),
    "loaded": _by_state,
    "exchanged on loading": lambda layer: _by_state(layer, assign=True),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(7, 6))),
    "other memory": lambda layer: setattr(layer.weight, "data", torch.randn(7, 6)),
    "the same memory in another order": lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight.detach().as_strided((7, 6), (1, 7)))
    ),
    "through data, then a change of mode": _by_data,
    "cast": lambda layer: layer.half().float(),
    "cast up": lambda layer: layer.double(),
    "merging another adapter": _by_merging,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [False, True])
def test_when_the_base_changes_so_does_the_norm(change: str, copied: bool) -> None:
    layer = nn.Linear(6, 7)
    inject(layer, DoRA(r=R, target_modules=".*"))
    _moved(layer)(torch.randn(2, 6))  # the norm is known now
    layer = copy.deepcopy(layer) if copied else layer
    with torch.no_grad():
        CHANGES[change](layer)
        adapter = layer.peft.default
        expected = (layer.weight + adapter.scale * adapter.lora_B @ adapter.lora_A).norm(dim=1)
    torch.testing.assert_close(adapter.norm(), expected)


def test_a_weight_called_for_once_counts_for_once() -> None:
    layer = _adapted(nn.Linear(6, 7))
    x, weight = torch.randn(2, 6), torch.randn(7, 6)
    before = layer(x)
    other = torch.func.functional_call(layer, {"weight": weight}, (x,))
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        layer.weight.copy_(weight)
    torch.testing.assert_close(layer(x), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_makes_nothing_of_the_weights_size(dtype: torch.dtype) -> None:
    size = 2048
    layer = nn.Linear(size, size).to(dtype)
    inject(layer, DoRA(r=2, target_modules=".*"))
    x = torch.randn(3, size, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer(x).sum().backward()
    made = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 0 < max(made) <= 2**22  # a quarter of the weight in fp32: what is converted from 16 bits at once
    assert max(made) < size * size * dtype.itemsize


# Beside others


def test_a_combination_with_tuned_biases_merges_to_the_same() -> None:
    model, x = tiny_models.bert().eval(), {"input_ids": torch.arange(1, 7)[None]}
    inject(model, Combine([DoRA(r=2), BitFit()]))
    _moved(model)
    expected = model(**x).logits
    merge(model)
    torch.testing.assert_close(model(**x).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [("dora", "lora"), ("lora", "dora")])
def test_another_adapter_is_not_folded_into_weights_whose_norm_is_read(order: tuple[str, str]) -> None:
    layer, x = nn.Linear(6, 7), torch.randn(2, 6)
    inject(layer, DoRA(r=2, target_modules=".*"), "dora")
    inject(layer, LoRA(r=2, target_modules=".*"), "lora")
    activate(layer, *order)
    expected = _moved(layer)(x)
    with pytest.raises(NotMergeableError, match="'dora' acts there too"):
        merge(layer, "lora")
    if order == ("dora", "lora"):  # what is added afterwards does not mind
        with merged(layer, "dora"):
            torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("recipe", ["linear", "cat", "svd"])
def test_norms_do_not_add_up(recipe: str) -> None:
    layer = nn.Linear(6, 7)
    for name in ("one", "two"):
        inject(layer, DoRA(r=2, target_modules=".*"), name)
    with pytest.raises(NotApplicableError, match="rescales the weights to norms of its own"):
        combine(layer, {"one": 0.5, "two": 0.5}, recipe)


def test_quantized_weights_are_refused_with_the_layers_name() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(8, 8)})
    model["fc"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotApplicableError, match=r"norm of the weights of 'fc' \(Linear\).*torch\.int8"):
        inject(model, DoRA(r=2, target_modules=["fc"]))
    assert "peft" not in model["fc"]._modules


def test_it_checks_the_fields_that_it_shares_with_lora() -> None:
    for field, value in {"r": 0, "alpha": -1, "dropout": 1, "use_rslora": 1, "rank_pattern": {"(": 1}}.items():
        with pytest.raises(ConfigError, match=rf"DoRA\.{field} must be"):
            DoRA(**{field: value})
    with pytest.raises(NotApplicableError, match=r"DoRA\.dropout=0\.1 cannot act on 'in_proj'"):
        inject(nn.MultiheadAttention(8, 2), DoRA(r=2, dropout=0.1))


# Against peft


class Around(nn.Module):
    """peft wants the adapted layer below a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 7), lambda: torch.randn(2, 4, 6)),
    "no bias": (lambda: nn.Linear(6, 7, bias=False), lambda: torch.randn(5, 6)),
    "hf_conv1d": (lambda: Conv1D(7, 6), lambda: torch.randn(2, 4, 6)),
    "embedding": (lambda: nn.Embedding(9, 5, padding_idx=0), lambda: torch.randint(9, (2, 4))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1), lambda: torch.randn(2, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 7, (3, 2), (2, 1), (1, 2)), lambda: torch.randn(2, 3, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, bias=False), lambda: torch.randn(2, 2, 4, 3, 5)),
}
_PEFTS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients_equal_pefts_on_every_kind_of_layer(kind: str, rslora: bool, tmp_path: Any) -> None:
    build, example = LAYERS[kind]
    base, x = Around(build()), example()
    config = peft.LoraConfig(
        r=2, target_modules=["layer"], use_dora=True, use_rslora=rslora, fan_in_fan_out=kind == "hf_conv1d"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    _moved(theirs).save_pretrained(tmp_path / "theirs")
    load_adapter(base, tmp_path / "theirs")
    found, expected = base(x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for output in (found, expected):
        output.square().mean().backward()
    layer, adapter, compared = theirs.base_model.model.layer, base.layer.peft.default, set()
    for key, parameter in layer.named_parameters():
        if parameter.requires_grad:
            name = _PEFTS.get(key.partition(".")[0], "lora_magnitude_vector")
            mine = adapter.get_parameter(name).grad
            torch.testing.assert_close(mine, parameter.grad.view_as(mine), rtol=1e-4, atol=1e-5)
            compared.add(name)
    assert compared == {name for name, _ in adapter.named_parameters()}
    save_adapter(base, tmp_path / "ours")
    remove(base)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)


def test_in_a_file_one_field_tells_it_from_lora(tmp_path: Any) -> None:
    for method in (DoRA(r=2), LoRA(r=2)):
        model = tiny_models.bert()
        inject(model, method)
        save_adapter(model, tmp_path)
        (tmp_path / "lightning_peft.json").unlink()  # as if peft had written it
        remove(model)
        load_adapter(model, tmp_path, "read")
        adapter = model.bert.encoder.layer[0].attention.self.query.peft.read
        assert ("lora_magnitude_vector" in dict(adapter.named_parameters())) == isinstance(method, DoRA)
