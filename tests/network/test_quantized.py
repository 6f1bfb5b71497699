"""Adapters beside quantized weights, merged into what they stand for, and carried to and from an unquantized base."""

import copy
import pickle
from pathlib import Path

import pytest
import tiny_models
import torch
from perturbation import adapted, perturb
from quantizing import OWN, PACKAGES, quantize
from snapshot import Snapshot
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import (
    IA3,
    BitFit,
    BottleneckAdapter,
    DoRA,
    LoRA,
    SelectiveTuning,
    inject,
    load_adapter,
    merge,
    merged,
    remove,
    save_adapter,
)
from lightning_peft.core.method import Method
from lightning_peft.errors import BaseMismatchError, NotApplicableError, NotMergeableError
from lightning_peft.network.quantized.weights import plain_weight, quantized_weights
from lightning_peft.network.sublayers import find_sublayers

LORA, DORA = LoRA(r=3, target_modules=["0", "2"]), DoRA(r=3, target_modules=["0", "2"])


@pytest.fixture
def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 8))


@pytest.fixture(params=[OWN, *PACKAGES])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def net(plain: nn.Module, scheme: str) -> nn.Module:
    return quantize(plain, scheme)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 32)


def _written_out(net: nn.Module, plain: nn.Module) -> nn.Module:
    """The plain network with the values that the quantized one stands for, by its own matrix product."""
    twin = copy.deepcopy(plain)
    with torch.no_grad():
        for layer, other in ((net[0], twin[0]), (net[2], twin[2])):
            layer.train()  # in eval, eight bits round the input as well
            other.weight.copy_((layer(torch.eye(other.in_features)) - layer.bias).T)
    return twin


def test_what_a_weight_stands_for_is_what_its_layer_computes_with(net, plain) -> None:
    twin = _written_out(net, plain)
    for layer in ("0", "2"):
        found, expected = plain_weight(net, f"{layer}.weight"), twin.get_parameter(f"{layer}.weight")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_no_entry_lies_further_from_the_plain_weight_than_the_error_says(net, plain) -> None:
    found = {path: weight for path, _, _, weight in quantized_weights(net)}
    assert found.keys() == {"0", "2"}
    for path, weight in found.items():
        expected = plain.get_parameter(f"{path}.weight")
        assert weight.shape == expected.shape
        apart, error = (weight.dequantize() - expected).abs(), weight.error().expand(weight.shape)
        assert (apart <= error + 1e-6).all()
        assert (error < expected.abs().max() / 2).all(), "an error this large would let any weight pass"


def test_a_report_counts_what_weights_stand_for(net, plain) -> None:
    found, expected = inject(net, LORA), inject(plain, LORA)
    assert (found.trainable, found.total) == (expected.trainable, expected.total)
    assert found.parts == expected.parts


@pytest.mark.parametrize("method", [LORA, DORA, IA3(target_modules=["0", "2"], feedforward_modules=["2"])])
def test_gradients_are_those_beside_the_plain_weights(net, plain, x, method) -> None:
    twin = _written_out(net, plain)
    gradients = []
    for model in (net, twin):
        torch.manual_seed(3)
        adapted(model, method).train()
        model(x).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [LORA, BottleneckAdapter(target_modules=["0", "2"], modules_to_save=None)])
def test_training_leaves_the_base_alone_and_removing_is_exact(net, x, method) -> None:
    before, expected = Snapshot(net), net(x)
    inject(net, method)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        net(x).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(net(x), expected)
    remove(net)
    before.assert_same(net)
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("method", [LORA, DORA])
@pytest.mark.parametrize("onto_plain", [True, False])
def test_an_adapter_goes_from_one_base_to_the_other(net, plain, x, onto_plain, method, tmp_path: Path) -> None:
    source, target = (net, plain) if onto_plain else (plain, net)
    adapted(source, method)
    save_adapter(source, tmp_path / "adapter")
    load_adapter(target, tmp_path / "adapter")
    for name, tensor in source.state_dict().items():
        if ".peft." in name:
            assert torch.equal(tensor, target.state_dict()[name])
    torch.testing.assert_close(target.eval()(x), source.eval()(x), rtol=0.5, atol=0.5)


@pytest.mark.parametrize("on_plain", [True, False])
def test_an_adapter_of_other_weights_is_refused(net, plain, scheme, on_plain, tmp_path: Path) -> None:
    save_adapter(adapted(net, LORA), tmp_path / "adapter")
    with torch.no_grad():
        plain[2].weight.copy_(plain[2].weight.flip(0))
    other = plain if on_plain else quantize(plain, scheme)
    with pytest.raises(BaseMismatchError, match=r"the weights of '2\.weight' differ"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize("width", [32, 64])
def test_a_weight_may_be_quantized_the_other_way_round(width, tmp_path: Path) -> None:
    turned, plain = nn.Sequential(Conv1D(width, 32)), nn.Sequential(nn.Linear(32, width), nn.Linear(1, 1))
    with torch.no_grad():
        plain[0].weight.copy_(turned[0].weight.T)
        plain[0].bias.copy_(turned[0].bias)
    net = quantize(plain, OWN)[:1]
    save_adapter(adapted(turned, LoRA(r=3)), tmp_path / "adapter")
    load_adapter(net, tmp_path / "adapter")
    assert torch.equal(net[0].peft.default.lora_B, turned[0].peft.default.lora_B)
    other = quantize(nn.Sequential(nn.Linear(32, width), nn.Linear(1, 1)), OWN)[:1]
    with pytest.raises(BaseMismatchError, match=r"the weights of '0\.weight' differ"):
        load_adapter(other, tmp_path / "adapter")


def test_the_adapter_alone_loads_strictly(net, x) -> None:
    source, target = adapted(copy.deepcopy(net), LORA), net
    inject(target, LORA)
    target.load_state_dict({name: tensor for name, tensor in source.state_dict().items() if ".peft." in name})
    assert torch.equal(target.eval()(x), source(x))


def test_merging_is_refused_unless_it_may_dequantize(net) -> None:
    adapted(net, LORA)
    before = Snapshot(net)
    for act in (lambda: merge(net), lambda: merged(net).__enter__()):
        with pytest.raises(NotMergeableError, match=r"LoRA on '0'.*is quantized.*dequantize=True"):
            act()
    before.assert_same(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method", [LORA, DORA, LoRA(r=3, target_modules=["2"]), IA3(target_modules=["2"]), BitFit(target_modules=["0"])]
)
def test_merging_can_make_the_whole_model_plain(net, plain, x, dtype, method: Method) -> None:
    net.to(dtype)
    expected = adapted(net, method).train()(x.to(dtype))
    merge(net, dequantize=True)
    found = net(x.to(dtype))
    assert (found - expected).norm() < (0.02 if dtype == torch.bfloat16 else 1e-5) * expected.norm()

    assert [(type(module), *vars(module)) for module in net] == [(type(module), *vars(module)) for module in plain]
    assert {type(p) for p in net.parameters()} == {nn.Parameter}
    assert {(p.dtype, p.requires_grad) for p in net.parameters()} == {(dtype, True)}
    plain.to(dtype).load_state_dict(net.state_dict())
    assert torch.equal(plain(x.to(dtype)), found)
    assert not any(package in pickle.dumps(net) for package in (b"bitsandbytes", b"torchao", b"quantizing"))


def test_other_adapters_stay_when_one_is_merged(net, x) -> None:
    for name in ("a", "b"):
        inject(net, LORA, name)
    expected = perturb(net).train()(x)
    merge(net, "b", dequantize=True)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, p in net.named_parameters() if p.requires_grad and ".peft.a." not in name] == []
    merge(net, "a")
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_a_tied_quantized_weight_is_merged_when_it_may_be_untied(x) -> None:
    net = quantize(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 8)), OWN)
    net[2].weight, net[2].step = net[0].weight, net[0].step
    expected, other = adapted(net, LoRA(target_modules=["0"]))(x), plain_weight(net[2])
    with pytest.raises(NotMergeableError, match="tied"):
        merge(net, dequantize=True)
    merge(net, dequantize=True, untie=True)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(net[2].weight, other)


def test_a_merge_that_fails_leaves_the_model_quantized(net) -> None:
    adapted(net, LORA)[2].peft.default.lora_A.data.fill_(float("inf"))
    before = Snapshot(net)
    with pytest.raises(NotMergeableError, match="not finite"):
        merge(net, dequantize=True)
    before.assert_same(net)


@pytest.mark.parametrize(
    "method",
    [
        SelectiveTuning(target_modules=["2"]),
        SelectiveTuning(target_modules=["2"], density=0.1, score="magnitude"),
        SelectiveTuning(target_modules=["2"], density=0.1, score="fisher"),
        LoRA(target_modules=["0"], modules_to_save=["2"]),
    ],
)
def test_what_would_train_a_quantized_weight_is_refused(net, method) -> None:
    before = Snapshot(net)
    with pytest.raises(NotApplicableError, match=r"weight' cannot be trained: .* as after quantization"):
        inject(net, method)
    before.assert_same(net)


def test_what_would_change_a_quantized_weight_is_refused() -> None:
    net = nn.Sequential(nn.MultiheadAttention(32, 4))
    net[0].out_proj = quantize(nn.Sequential(nn.Linear(32, 32), nn.Linear(1, 1)), OWN)[0]
    with pytest.raises(NotApplicableError, match=r"changes the 'out_proj\.weight' of '0'.*quantized \(Nibbles\)"):
        inject(net, LoRA(target_modules=["out_proj"]))


def test_biases_train_in_full_precision_where_a_layer_casts_its_own(net, x) -> None:
    inject(net, BitFit(target_modules=["0", "2"]))
    with torch.autocast("cpu", torch.bfloat16):
        net(x).square().mean().backward()
    biases = [p for p in net.parameters() if p.requires_grad]
    assert [(p.dtype, p.grad.dtype) for p in biases] == [(torch.float32, torch.float32)] * 2


def test_copies_compute_the_same(net, x, scheme) -> None:
    expected = adapted(net, LORA)(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    if not scheme.startswith("torchao"):  # it leaves a function on the layer that Python cannot pickle
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)


def test_blocks_are_told_apart_as_in_the_plain_model() -> None:
    plain = tiny_models.llama()
    found = find_sublayers(plain)
    assert found
    assert all(sublayer.pre is not None for sublayer in found)
    assert find_sublayers(quantize(plain, OWN)) == found


def test_an_adapter_that_looks_at_blocks_loads_though_it_is_smaller_than_they_are(tmp_path: Path) -> None:
    plain = tiny_models.llama(hidden_size=96, intermediate_size=512)
    save_adapter(adapted(quantize(plain, OWN), BottleneckAdapter(width=1)), tmp_path / "adapter")
    assert load_adapter(quantize(plain, OWN), tmp_path / "adapter").trainable
    assert load_adapter(plain, tmp_path / "adapter").trainable


def test_four_bits_in_the_order_that_some_cpus_get_in_eval_are_read() -> None:
    functions = pytest.importorskip("bitsandbytes.functional")
    net = quantize(nn.Sequential(nn.Linear(64, 32), nn.Linear(1, 1)), "nf4 double")
    expected, weight = plain_weight(net[0]), net[0].weight
    weight.data, weight.quant_state = functions._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    torch.testing.assert_close(plain_weight(net[0]), expected, rtol=0.02, atol=1e-3)  # it rounds the scales to 16 bits
