"""Going on, on another task, from an adapter that was trained before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from project import OnPEFTModule, Project, build_network
from snapshot import assert_identical
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import BottleneckAdapter, LoRA, PEFTCallback
from lightning_peft.errors import BaseMismatchError, CheckpointError, ConfigError


@pytest.fixture
def source(trainer, data, tmp_path) -> Callable[..., tuple[Any, dict[str, Path]]]:
    """Train an adapter called ``first``; (module, its checkpoint and its directory)."""

    def make(method: Any) -> tuple[Any, dict[str, Path]]:
        model = OnPEFTModule()
        run = trainer(PEFTCallback(method, "first", show=False))
        run.fit(model, data, data)
        run.save_checkpoint(tmp_path / "first.ckpt")
        lp.save_adapter(model, tmp_path / "first", "first")
        return model, {"ckpt": tmp_path / "first.ckpt", "directory": tmp_path / "first"}

    return make


def own(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        key.replace(f"peft.{name}", "peft.*"): tensor.clone()
        for key, tensor in model.state_dict().items()
        if f"peft.{name}" in key
    }


@pytest.mark.parametrize("kind", ["ckpt", "directory"])
@pytest.mark.parametrize("method", [LoRA(r=4, modules_to_save=["net.5"]), BottleneckAdapter(target_modules=["0"])])
def test_an_adapter_goes_on_from_another_task(method, kind, source, trainer, data) -> None:
    model, paths = source(method)
    for asked in (None, method):
        started: dict[str, Tensor] = {}

        class Second(Project):
            def on_train_start(self, started: dict[str, Tensor] = started) -> None:
                started.update(own(self, "second"))

        second = Second()
        trainer(PEFTCallback(asked, "second", show=False, init_from=paths[kind])).fit(second, data, data)
        assert started.keys() == own(model, "first").keys()
        for key, tensor in own(model, "first").items():
            assert_identical(started[key], tensor, key)
        assert any(not torch.equal(tensor, started[key]) for key, tensor in own(second, "second").items())


@pytest.mark.parametrize("kind", ["ckpt", "directory"])
def test_an_adapter_to_go_on_from_must_fit(kind, source, trainer, data, tmp_path) -> None:
    class OtherBase(Project):
        def build(self) -> None:
            super().build()
            self.net[3].weight.data.add_(1)

    _, paths = source(LoRA(r=4))
    with pytest.raises(ConfigError, match=r"first.* is an adapter of LoRA.*r=4.*asks for LoRA.*r=8"):
        trainer(PEFTCallback(LoRA(r=8), show=False, init_from=paths[kind])).fit(Project(), data, data)
    with pytest.raises(BaseMismatchError, match=r"net\.3\.weight"):
        trainer(PEFTCallback(None, show=False, init_from=paths[kind])).fit(OtherBase(), data, data)
    with pytest.raises(CheckpointError):
        trainer(PEFTCallback(None, show=False, init_from=tmp_path / "nowhere")).fit(Project(), data, data)


def test_an_adapter_is_stacked_on_a_base_with_another_one_merged(tmp_path):
    def stacked() -> nn.Module:
        network = build_network().eval()
        lp.inject(network, LoRA(r=4), "first")
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for parameter in network.parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter, std=0.1)
        lp.merge(network, "first")
        return network

    network = stacked()
    lp.inject(network, LoRA(r=2), "second")
    nn.init.normal_(network[3].peft.second.lora_B)
    lp.save_adapter(network, tmp_path / "second", "second")
    x = torch.randn(4, 16)
    again = stacked()
    lp.load_adapter(again, tmp_path / "second", "second")
    assert_identical(again(x), network(x))
    with pytest.raises(BaseMismatchError, match=r"'0\.weight' differ"):
        lp.load_adapter(build_network(), tmp_path / "second", "second")
