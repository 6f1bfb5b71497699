"""Restoring a checkpoint starts no adapter: the file brings the values, and none is ever left without them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from project import BuiltInConfigureModel, BuiltInSetup, OnPEFTModule, Project
from snapshot import assert_identical
from torch import Tensor, nn

from lightning_peft import LoRA, PEFTCallback
from lightning_peft.checkpoints.ckpt import has_adapters
from lightning_peft.core.adapter import Adapter
from lightning_peft.core.starting import starts
from lightning_peft.errors import CheckpointError
from lightning_peft.network.hosts import Host

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging"),
]
PROJECTS = [Project, BuiltInSetup, BuiltInConfigureModel, OnPEFTModule]
decomposed: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Decomposing(LoRA):
    """Starts with a decomposition of each weight; what a file is to replace is NaN until then."""

    def build_output(self, host: Host, r: int, scale: float) -> Adapter:
        adapter: Any = super().build_output(host, r, scale)
        if starts():
            decomposed.append(host.name)
            adapter.lora_A.data.copy_(torch.linalg.svd(host.module.weight).Vh[:r])
        else:
            for parameter in adapter.parameters():
                nn.init.constant_(parameter, torch.nan)
        return adapter


class Seen(L.Callback):
    """The adapter's values when a stage begins."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.values = adapter_of(pl_module)

    on_test_start = on_predict_start = on_fit_start

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.validating:
            self.on_fit_start(trainer, pl_module)


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if ".peft." in key}


def assert_same(values: dict[str, Tensor], path: Any) -> None:
    stored = {k: t for k, t in torch.load(path, weights_only=True)["state_dict"].items() if ".peft." in k}
    assert values.keys() == stored.keys() != set()
    for key, tensor in stored.items():
        assert_identical(values[key], tensor, key)


def assert_started(model: nn.Module) -> None:
    assert decomposed
    assert adapter_of(model)
    assert all(tensor.isfinite().all() for tensor in adapter_of(model).values())


def peft(name: str = "default", **options: Any) -> PEFTCallback:
    return PEFTCallback(Decomposing(r=2), name, show=False, **options)


@pytest.fixture
def trained(data, trainer, tmp_path) -> Callable[[type], tuple[L.Trainer, Path]]:
    """A Trainer whose run of one epoch has written a checkpoint, and that file; the count begins anew after it."""

    def train(cls: type[Any] = Project) -> tuple[L.Trainer, Path]:
        decomposed.clear()
        run = trainer(peft(), Seen(), ModelCheckpoint(tmp_path / "kept", save_last=True))
        run.fit(cls(), data, data)
        assert len(decomposed) == 3
        decomposed.clear()
        return run, tmp_path / "kept" / "last.ckpt"

    return train


def seen_by(run: L.Trainer) -> dict[str, Tensor]:
    return next(callback for callback in run.callbacks if isinstance(callback, Seen)).values


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("source", ["path", "last", "trainer.ckpt_path"])
def test_a_fit_that_goes_on_starts_no_adapter(project, source, trained, data, trainer, tmp_path) -> None:
    _, path = trained(project)
    run = trainer(peft(), Seen(), ModelCheckpoint(tmp_path / "kept", save_last=True), max_epochs=1)
    if source == "trainer.ckpt_path":
        run.ckpt_path = path
    run.fit(project(), data, data, ckpt_path={"path": path, "last": "last"}.get(source))
    assert not decomposed
    assert_same(seen_by(run), path)


@pytest.mark.parametrize("project", PROJECTS)
def test_training_goes_on_from_the_values_of_the_file(project, trained, data, trainer) -> None:
    _, path = trained(project)
    model, run = project(), trainer(peft(), max_epochs=2)
    run.fit(model, data, data, ckpt_path=path)
    assert run.global_step == 2 * len(data)
    assert not decomposed
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert all(t.isfinite().all() and not torch.equal(t, stored[key]) for key, t in adapter_of(model).items())


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_the_other_stages_start_no_adapter_either(project, stage, trained, data) -> None:
    run, path = trained(project)
    for source in ("best", "last", path):
        getattr(run, stage)(project(), data, ckpt_path=source)
        assert not decomposed
        assert_same(seen_by(run), run.ckpt_path)


@pytest.mark.parametrize("project", PROJECTS)
def test_a_path_of_the_call_before_counts_no_more(project, trained, data) -> None:
    run, path = trained(project)
    run.test(project(), data, ckpt_path=path)
    assert run.ckpt_path == path
    model = project()
    run.test(model, data)
    assert_started(model)


@pytest.mark.parametrize("project", PROJECTS)
def test_the_last_checkpoint_where_there_is_none_is_a_start(project, data, trainer, tmp_path) -> None:
    decomposed.clear()
    model = project()
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        trainer(peft(), ModelCheckpoint(tmp_path / "none", save_last=True)).fit(model, data, data, ckpt_path="last")
    assert_started(model)


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("name", "holds no adapter 'second'; it holds 'default'"),
        ("method", "'default' of the file is another one: r is 2 in the file and 4 here"),
        ("full", "holds no adapter; it looks like a full checkpoint"),
        ("missing", "There is no checkpoint"),
        ("weights", "holds weights only"),
    ],
)
def test_a_file_that_does_not_fit_leaves_no_adapter_behind(
    project, bad, message, trained, data, trainer, tmp_path
) -> None:
    run, path = trained(project)
    callback = peft("second" if bad == "name" else "default")
    if bad == "method":
        callback = PEFTCallback(Decomposing(r=4), show=False)
    elif bad == "full":
        run = trainer(max_epochs=1)
        run.fit(project(), data, data)
        run.save_checkpoint(path := tmp_path / "full.ckpt")
    elif bad == "missing":
        path = tmp_path / "nowhere.ckpt"
    elif bad == "weights":
        run.save_checkpoint(path := tmp_path / "weights.ckpt", weights_only=True)
    model, run = project(), trainer(callback, max_epochs=2)
    with pytest.raises(CheckpointError, match=message):
        run.fit(model, data, data, ckpt_path=path)
    assert not has_adapters(model)
    # Whoever goes on with the module nevertheless trains adapters that have started.
    decomposed.clear()
    trainer(callback).fit(model, data, data)
    assert_started(model)


def test_what_an_adapter_once_started_from_need_not_be_there_any_more(trained, data, trainer, tmp_path) -> None:
    _, path = trained()
    for method in (None, Decomposing(r=2)):
        run = trainer(PEFTCallback(method, show=False, init_from=tmp_path / "gone"), Seen())
        run.fit(Project(), data, data, ckpt_path=path)
        assert not decomposed
        assert_same(seen_by(run), path)


def test_base_weights_are_loaded_before_the_adapter_of_the_file(data, trainer, tmp_path) -> None:
    torch.save({key: tensor + 1 for key, tensor in Project().state_dict().items()}, tmp_path / "base.pt")
    callback = peft(base_weights=tmp_path / "base.pt")
    run = trainer(callback)
    run.fit(trained := Project(), data, data)
    run.save_checkpoint(tmp_path / "task.ckpt")
    decomposed.clear()
    run = trainer(callback)
    run.test(model := Project(), data, ckpt_path=tmp_path / "task.ckpt")
    assert not decomposed
    x = torch.randn(4, 16)
    assert_identical(model.eval()(x), trained.eval()(x))


def test_a_strategy_that_restores_later_finds_adapters_that_have_started(trained, data, trainer) -> None:
    class Later(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    _, path = trained()
    run = trainer(peft(), Seen(), strategy=Later(), accelerator="auto")
    run.test(Project(), data, ckpt_path=path)
    assert len(decomposed) == 3
    assert_same(seen_by(run), path)


@pytest.mark.parametrize("average", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=3)])
@pytest.mark.parametrize("project", PROJECTS)
def test_averages_begin_with_the_values_of_the_file(average, project, trained, data, trainer) -> None:
    _, path = trained(project)
    model = project()
    trainer(average(), peft(), max_epochs=4).fit(model, data, data, ckpt_path=path)
    assert not decomposed
    assert all(tensor.isfinite().all() for tensor in adapter_of(model).values())


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_trainer_that_does_not_load_its_file_is_stopped(stage, trained, data, trainer, monkeypatch) -> None:
    _, path = trained()
    run = trainer(peft())
    monkeypatch.setattr(run._checkpoint_connector, "restore_model", lambda: None)
    model = Project()
    with pytest.raises(CheckpointError, match=r"has not loaded .*last\.ckpt into Project, so the adapters 'default'"):
        getattr(run, stage)(model, *[data] * (2 if stage == "fit" else 1), ckpt_path=path)
