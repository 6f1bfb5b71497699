"""Adapters under Lightning Fabric, which knows no callbacks: ``inject``, then the loop as it is."""

from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from project import build_network
from snapshot import assert_identical
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import LoRA, inject


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
    return x, x[:, :8].argmax(-1)


class Run:
    """A network with an adapter and its optimizer, set up by Fabric or plain."""

    def __init__(self, fabric: Fabric | None = None) -> None:
        torch.manual_seed(7)
        self.network = build_network()
        inject(self.network, LoRA(r=2, target_modules=["0", "3"], modules_to_save=["5"]))
        optimizer = torch.optim.AdamW((p for p in self.network.parameters() if p.requires_grad), lr=1e-2)
        self.fabric = fabric
        self.model: nn.Module = self.network
        self.optimizer = optimizer
        if fabric:
            self.model, self.optimizer = fabric.setup(self.network, optimizer)
        self.step = 0

    def train(self, until: int) -> "Run":
        self.model.train()
        for step in range(self.step, until):
            x, labels = batch(step)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x).float(), labels)
            self.fabric.backward(loss) if self.fabric else loss.backward()
            self.optimizer.step()
        self.step = until
        return self

    def save(self, path: Path) -> None:
        state = {"model": self.model, "optimizer": self.optimizer, "step": self.step}
        self.fabric.save(path, state, filter={"model": lambda key, _: ".peft." in key})

    def load(self, path: Path) -> "Run":
        state = {"model": self.model, "optimizer": self.optimizer, "step": self.step}
        self.fabric.load(path, state)  # strictly
        self.step = state["step"]
        return self


def fabric(precision: str = "32-true") -> Fabric:
    return Fabric(accelerator="cpu", devices=1, precision=precision)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert_identical(found.state_dict()[key], tensor, key)


def test_a_fabric_loop_ends_bit_equal_to_the_same_loop_in_plain_torch():
    plain, run = Run().train(6), Run(fabric()).train(6)
    assert run.model is not run.network  # Fabric wraps it
    assert_same(run.network, plain.network)
    for key, tensor in build_network().state_dict().items():
        assert_identical(run.network.state_dict()[key], tensor, key)
    assert not torch.equal(run.network.state_dict()["5.peft.default.weight"], build_network()[5].weight)


def test_the_adapter_alone_is_saved_and_a_resumed_loop_ends_bit_equal(tmp_path):
    straight = Run(fabric()).train(6)
    Run(fabric()).train(3).save(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert len(saved["model"]) == 6
    assert all(".peft.default." in key for key in saved["model"])
    resumed = Run(fabric()).load(tmp_path / "half.ckpt")
    assert resumed.step == 3
    assert_same(resumed.train(6).network, straight.network)


@pytest.mark.parametrize(("precision", "base"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_in_low_precision_the_adapter_stays_fp32_and_trains(precision, base):
    run = Run(fabric(precision))
    before = {key: tensor.clone() for key, tensor in run.network.state_dict().items()}
    run.train(3)
    for name, parameter in run.network.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else base), name
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


def test_a_compiled_network_is_set_up_and_keeps_its_adapter():
    network = torch.compile(build_network(), backend="eager")
    inject(network, LoRA(r=2))
    model = fabric().setup(network)
    x, _ = batch(0)
    model.eval()
    network._orig_mod[0].peft.default.lora_B.data.normal_()
    assert not torch.allclose(model(x), build_network().eval()(x))
    with lp.disabled(network):
        torch.testing.assert_close(model(x), build_network().eval()(x))
