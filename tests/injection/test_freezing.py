"""A frozen base: no drift, and strict loading without the base's own keys."""

import pytest
import torch
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

from lightning_peft import LoRA, inject, remove
from lightning_peft.checkpoints.ckpt import adapter_state

NORMS = {
    "batchnorm": lambda: nn.BatchNorm1d(4),
    "instancenorm": lambda: nn.InstanceNorm1d(4, track_running_stats=True),
    "syncbatchnorm": lambda: nn.SyncBatchNorm(4),
}


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 4), norm, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x).transpose(1, 2)).transpose(1, 2))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 4)


@pytest.mark.parametrize("norm", NORMS)
def test_a_frozen_norm_computes_as_in_eval_and_its_statistics_stay(norm: str, x: Tensor) -> None:
    net = Net(NORMS[norm]()).eval()
    nn.init.normal_(net.norm.running_mean)
    expected, statistics = net(x), net.norm.running_mean.clone()
    inject(net, LoRA(r=2, target_modules=["body"]))
    net.train()
    torch.testing.assert_close(net(x), expected)
    assert_identical(net.norm.running_mean, statistics)
    assert net.norm.num_batches_tracked == 0
    assert all(module.training for module in net.modules()), "the modes that the user sees are the user's"


def test_a_frozen_norm_stays_in_eval_when_a_model_in_train_mode_is_compiled() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), torch.randn(5, 4)
    nn.init.normal_(net[1].running_mean)
    expected, statistics = net(x), net[1].running_mean.clone()
    inject(net, LoRA(r=2))
    torch._dynamo.reset()
    compiled = torch.compile(net.train(), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()
    assert_identical(net[1].running_mean, statistics)
    assert all(module.training for module in net.modules())


def test_a_norm_that_keeps_no_statistics_is_left_alone(x: Tensor) -> None:
    net = Net(nn.BatchNorm1d(4, track_running_stats=False)).train()
    expected = net(x)
    before = Snapshot(net)
    inject(net, LoRA(r=2, target_modules=["body"]))
    torch.testing.assert_close(net(x), expected)
    remove(net)
    before.assert_same(net)


def test_an_exception_in_a_norm_leaves_its_mode() -> None:
    net = Net(nn.BatchNorm1d(4)).train()
    inject(net, LoRA(r=2, target_modules=["body"]))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        net.norm(torch.ones(4))
    assert net.norm.training


def test_after_removal_a_norm_trains_again(x: Tensor) -> None:
    net = Net(nn.BatchNorm1d(4)).train()
    inject(net, LoRA(r=2, target_modules=["body"]))
    net(x)
    remove(net)
    net(x)
    assert net.norm.num_batches_tracked == 1


@pytest.fixture
def net() -> Net:
    net = Net(nn.BatchNorm1d(4))
    inject(net, LoRA(r=2, target_modules=["body"], modules_to_save=["head"]))
    return net


def test_the_adapters_state_alone_loads_strictly_and_the_base_stays(net: Net) -> None:
    base = {key: tensor.clone() for key, tensor in net.state_dict().items() if ".peft." not in key}
    state = {key: torch.ones_like(tensor) for key, tensor in adapter_state(net).items()}
    net.load_state_dict(state)
    for key, tensor in net.state_dict().items():
        assert_identical(tensor, base[key] if key in base else torch.ones_like(tensor), key)


def test_it_loads_below_another_module(net: Net) -> None:
    outer = nn.ModuleDict({"net": net})
    outer.load_state_dict({key: torch.ones_like(tensor) for key, tensor in adapter_state(outer).items()})
    assert torch.equal(net.body.peft.default.lora_A, torch.ones(2, 4))


def test_a_missing_adapter_tensor_is_still_an_error(net: Net) -> None:
    state = adapter_state(net)
    del state["body.peft.default.lora_B"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"body.peft.default.lora_B\"\."):
        net.load_state_dict(state)


def test_a_tensor_left_over_is_still_an_error(net: Net) -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"body.peft.other.lora_B\"\."):
        net.load_state_dict({**adapter_state(net), "body.peft.other.lora_B": torch.ones(1)})


def test_a_base_that_is_there_in_part_is_still_an_error(net: Net) -> None:
    state = net.state_dict()
    del state["norm.running_mean"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"norm.running_mean\"\."):
        net.load_state_dict(state)


def test_a_whole_state_loads_the_base_too(net: Net) -> None:
    net.load_state_dict({key: torch.full_like(tensor, 2) for key, tensor in net.state_dict().items()})
    assert torch.equal(net.body.weight, torch.full((4, 4), 2.0))


def test_the_given_state_is_left_as_it_was(net: Net) -> None:
    state = adapter_state(net)
    keys = list(state)
    net.load_state_dict(state)
    assert list(state) == keys


def test_without_an_adapter_a_model_loads_as_ever(net: Net) -> None:
    remove(net)
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})
