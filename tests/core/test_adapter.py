"""The hooks through which adapters act, and what an adapter's parameters are."""

from functools import partial

import pytest
import torch
from placing import Place, Scale, ScaleInput, ScaleWeight, Shift, ShiftWeight
from snapshot import Snapshot, hook_counts
from torch import Tensor, nn

from lightning_peft import LoRA, activate, inject, remove
from lightning_peft.core.adapter import Adapter, OutputAdapter
from lightning_peft.errors import NotMergeableError


class Net(nn.Module):
    """One layer below the network, so that hosts have a path."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.layer(*args, **kwargs)


@pytest.fixture
def net() -> Net:
    return Net(nn.Linear(3, 3))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3)


def test_an_output_adapter_changes_the_hosts_output(net: Net, x: Tensor) -> None:
    expected = net(x)
    inject(net, Place(adapters={"layer": Scale}))
    torch.testing.assert_close(net(x), 2 * expected)


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_an_output_adapter_is_given_the_hosts_first_input(net: Net, x: Tensor, how: str) -> None:
    class AddInput(OutputAdapter):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    expected = x + net(x)
    inject(net, Place(adapters={"layer": AddInput}))
    torch.testing.assert_close(net(x) if how == "positional" else net(input=x), expected)


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_an_input_adapter_changes_what_the_host_is_called_with(net: Net, x: Tensor, how: str) -> None:
    expected = net(3 * x)
    inject(net, Place(adapters={"layer": ScaleInput}))
    torch.testing.assert_close(net(x) if how == "positional" else net(input=x), expected)


def test_an_output_adapter_sees_the_input_that_an_input_adapter_made(net: Net, x: Tensor) -> None:
    class AddInput(OutputAdapter):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    expected = 3 * x + net(3 * x)
    inject(net, Place(adapters={"layer": AddInput}), "output")
    inject(net, Place(adapters={"layer": ScaleInput}), "input")
    torch.testing.assert_close(net(x), expected)


def test_a_weight_adapter_changes_what_the_host_reads(net: Net, x: Tensor) -> None:
    expected = nn.functional.linear(x, 5 * net.layer.weight, net.layer.bias)
    inject(net, Place(adapters={"layer": partial(ScaleWeight, "weight")}))
    torch.testing.assert_close(net(x), expected)


def test_a_weight_adapter_changes_buffers_and_parameters_further_down(x: Tensor) -> None:
    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3, bias=False)
            self.register_buffer("offset", torch.arange(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.inner.weight.T + self.offset  # reads the inner weight itself

    net = Net(Affine())
    expected = 5 * net(x)
    before = Snapshot(net)
    inject(net, Place(adapters={"layer": partial(ScaleWeight, "inner.weight", "offset")}))
    torch.testing.assert_close(net(x), expected)
    remove(net)
    before.assert_same(net)


@pytest.mark.parametrize(
    ("first", "second"),
    [(Scale, Shift), (partial(ScaleWeight, "weight", "bias"), partial(ShiftWeight, "weight", "bias"))],
    ids=["output", "weight"],
)
def test_adapters_of_one_host_act_in_the_order_of_activation(net: Net, x: Tensor, first: type, second: type) -> None:
    """Scaling and shifting do not commute, so the order shows."""
    base = nn.Linear(3, 3)
    base.load_state_dict(net.layer.state_dict())
    inject(net, Place(adapters={"layer": first}), "scale")
    inject(net, Place(adapters={"layer": second}), "shift")

    def alone(*factories: type) -> Tensor:
        fresh = Net(nn.Linear(3, 3))
        fresh.layer.load_state_dict(base.state_dict())
        for i, factory in enumerate(factories):
            inject(fresh, Place(adapters={"layer": factory}), f"n{i}")
        return fresh(x)

    scale_first, shift_first = alone(first, second), alone(second, first)
    assert not torch.allclose(scale_first, shift_first)
    torch.testing.assert_close(net(x), scale_first)
    activate(net, "shift", "scale")
    torch.testing.assert_close(net(x), shift_first)


def test_removing_an_adapter_keeps_the_order_of_the_others(net: Net, x: Tensor) -> None:
    inject(net, Place(adapters={"layer": Scale}), "scale")
    inject(net, Place(adapters={"layer": Shift}), "shift")
    inject(net, Place(adapters={"layer": Shift}), "third")
    activate(net, "shift", "scale")
    expected = net(x)
    remove(net, "third")
    torch.testing.assert_close(net(x), expected)


def test_all_adapters_of_one_kind_share_the_hosts_hooks(net: Net) -> None:
    inject(net, Place(adapters={"layer": Scale}), "a")
    once = hook_counts(net.layer)
    assert once
    inject(net, Place(adapters={"layer": Shift}), "b")
    assert hook_counts(net.layer) == once
    remove(net, "a")
    assert hook_counts(net.layer) == once
    remove(net, "b")
    assert hook_counts(net.layer) == {}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside_the_host_leaves_its_weights_in_place(x: Tensor, error: type[BaseException]) -> None:
    class Fragile(nn.Linear):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise error
            return super().forward(x)

    net = Net(Fragile(3, 3))
    inject(net, Place(adapters={"layer": partial(ScaleWeight, "weight")}))
    expected = net(x)
    before = Snapshot(net)
    net.layer.fails = True
    with pytest.raises(error):
        net(x)
    del net.layer.fails
    torch.testing.assert_close(net(x), expected)
    before.assert_same(net)


def test_right_after_an_interrupt_the_state_dict_holds_the_bases_weights(x: Tensor) -> None:
    class Interrupted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    net = Net(Interrupted(3, 3))
    weight = net.layer.weight.detach().clone()
    inject(net, Place(adapters={"layer": partial(ScaleWeight, "weight")}))
    with pytest.raises(KeyboardInterrupt):
        net(x)
    assert torch.equal(net.state_dict()["layer.weight"], weight)


def test_an_exception_in_a_second_weight_adapter_leaves_the_weights_in_place(net: Net, x: Tensor) -> None:
    class Broken(ScaleWeight):
        def forward(self, weight: Tensor, name: str) -> Tensor:
            raise ValueError("broken")

    before = Snapshot(net)
    inject(net, Place(adapters={"layer": partial(ScaleWeight, "weight")}), "a")
    inject(net, Place(adapters={"layer": partial(Broken, "bias")}), "b")
    with pytest.raises(ValueError, match="broken"):
        net(x)
    remove(net, "a")
    remove(net, "b")
    before.assert_same(net)


def test_a_host_that_runs_several_times_in_a_forward_is_adapted_each_time(x: Tensor) -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    net = Twice(nn.Linear(3, 3, bias=False))
    expected = 25 * net(x)
    inject(net, Place(adapters={"layer": partial(ScaleWeight, "weight")}))
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("target", ["linear1", "in_proj", "out_proj"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own, of the base as well
def test_an_adapter_acts_in_an_encoder_with_padding(target: str, mode: type) -> None:
    """With a padding mask a TransformerEncoder in eval packs its input into a nested tensor."""
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padded = torch.randn(2, 5, 12), torch.zeros(2, 5, dtype=torch.bool)
    padded[1, 3:] = True
    inject(encoder, LoRA(target_modules=[target]))
    base = encoder(x[1:, :3]).detach()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    expected = encoder(x[1:, :3])  # without padding there is no nested tensor
    assert not torch.allclose(expected, base, atol=1e-3)
    with mode():
        found = encoder(x, src_key_padding_mask=padded)[1:, :3]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Made(OutputAdapter):
    """Parameters of its own, of a module inside it, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.full((3,), 1 / 3))
        self.inner = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("table", torch.full((3,), 1 / 3))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.inner((self.own * self.frozen * self.table).to(self.inner.weight.dtype)).to(y.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_precision_ignores_casts_to_16_bits(net: Net, dtype: torch.dtype) -> None:
    inject(net, Place(adapters={"layer": Made}))
    before = {name: p.detach().clone() for name, p in net.named_parameters() if ".peft." in name}
    net.to(dtype)
    assert net.layer.weight.dtype == dtype
    for name, value in before.items():
        assert torch.equal(net.get_parameter(name), value), name
    assert net.layer.peft.default.table.dtype == torch.float32
    assert net.layer.peft.default.count.dtype == torch.int64


def test_wider_casts_are_followed_and_can_be_undone(net: Net) -> None:
    inject(net, Place(adapters={"layer": Made}))
    net.double()
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    net.float()
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_an_fp64_adapter_does_not_fall_to_16_bits(net: Net) -> None:
    inject(net, Place(adapters={"layer": Made}))
    net.double().bfloat16()
    assert net.layer.weight.dtype == torch.bfloat16
    assert all(p.dtype.itemsize >= 4 for name, p in net.named_parameters() if ".peft." in name)


def test_a_cast_moves_to_another_device_all_the_same(net: Net) -> None:
    inject(net, Place(adapters={"layer": Made}))
    net.to("meta", torch.bfloat16)
    own = net.get_parameter("layer.peft.default.own")
    assert own.is_meta
    assert own.dtype == torch.float32


def test_parameters_that_an_adapter_made_frozen_stay_frozen(net: Net) -> None:
    inject(net, Place(adapters={"layer": Made}))
    adapter = net.layer.peft.default
    for names in ((), ("default",)):
        activate(net, *names)
        assert adapter.own.requires_grad is bool(names)
        assert adapter.inner.weight.requires_grad is bool(names)
        assert not adapter.frozen.requires_grad


@pytest.mark.parametrize("mode", [True, False])
def test_everything_injected_is_in_the_mode_of_its_host(net: Net, mode: bool) -> None:
    net.train(mode)
    inject(net, Place(adapters={"layer": Made}))
    assert {path for path, module in net.named_modules() if module.training is not mode} == set()


def test_an_adapter_without_a_weight_form_says_that_it_cannot_be_merged() -> None:
    with pytest.raises(NotMergeableError, match="what it computes is no change"):
        Scale().merge({})


def test_an_adapters_repr_shows_the_shapes_of_its_parameters(net: Net) -> None:
    inject(net, LoRA(r=2, target_modules=["layer"]))
    assert "lora_A=(2, 3), lora_B=(3, 2)" in repr(net)
    assert isinstance(net.layer.peft.default, Adapter)
