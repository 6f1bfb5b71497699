"""Lightning's own callbacks beside PEFTCallback, in either order, and with the network built in any of three places."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from project import BuiltInConfigureModel, BuiltInSetup, OnPEFTModule, Project, ProjectData, build_network
from snapshot import assert_identical
from torch import Tensor, nn

from lightning_peft import LoRA, PEFTCallback, inject, load_from_checkpoint
from lightning_peft.errors import CheckpointError, ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

OWN_KEYS = {f"net.{i}.peft.default.lora_{x}" for i in (0, 3, 5) for x in "AB"}


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if ".peft." in key}


def assert_base_is_untouched(model: nn.Module) -> None:
    for key, tensor in build_network().state_dict().items():
        assert_identical(model.state_dict()[f"net.{key}"], tensor, key)


def tensors_in(value: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor anywhere in a checkpoint."""
    if isinstance(value, Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {at: t for key, item in items for at, t in tensors_in(item, f"{path}/{key}").items()}


BESIDE: dict[str, Callable[[], L.Callback]] = {
    "early_stopping": lambda: EarlyStopping("val_loss", patience=5),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "lr_finder": lambda: LearningRateFinder(num_training_steps=20),
    "batch_size_finder": lambda: BatchSizeFinder(max_trials=2),
    "accumulation": lambda: GradientAccumulationScheduler({0: 2, 1: 1}),
    "summary": lambda: ModelSummary(),
    "rich": lambda: RichProgressBar(),
}
PROJECTS = [Project, BuiltInSetup, BuiltInConfigureModel, OnPEFTModule]
# Each callback stands before ours and behind it in `make test`, and each project is in a quarter of these pairs.
BOTH_ORDERS = list(itertools.product(BESIDE, ["peft first", "peft last"]))
SETTINGS = [
    pytest.param(project, beside, first, marks=[] if (i + i // 4) % 4 == place else [pytest.mark.soak])
    for place, project in enumerate(PROJECTS)
    for i, (beside, first) in enumerate(BOTH_ORDERS)
]


@pytest.mark.parametrize(("project", "beside", "first"), SETTINGS)
def test_beside_any_callback_in_any_order_it_trains_saves_and_resumes(
    project, beside, first, trainer, tmp_path
) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> L.LightningModule:
        torch.manual_seed(0)
        model = project()
        model.lr = 1e-2  # where LearningRateFinder writes to
        callbacks = [PEFTCallback(LoRA(r=4), show=False), BESIDE[beside]()]
        if first == "peft last":
            callbacks.reverse()
        save = ModelCheckpoint(tmp_path, f"{epochs}")
        fitting = trainer(*callbacks, save, max_epochs=epochs, enable_progress_bar=beside == "rich")
        fitting.fit(model, datamodule=ProjectData(), ckpt_path=ckpt_path)
        return model

    run(2)
    resumed = run(4, ckpt_path=tmp_path / "2.ckpt")
    assert_base_is_untouched(resumed)
    assert set(adapter_of(resumed)) == OWN_KEYS
    assert len(resumed.net[0]._forward_hooks) == 1
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == OWN_KEYS
    # Nowhere, also not in what a callback keeps, lies a tensor of the base but the eight samples of each.
    shapes = {tuple(tensor.shape) for tensor in build_network().state_dict().values() if tensor.dim() == 2}
    assert [at for at, tensor in tensors_in(saved).items() if tuple(tensor.shape) in shapes] == []
    if beside not in ("lr_finder", "batch_size_finder", "swa"):  # these go by the length of the run
        straight = adapter_of(run(4))
        for key, tensor in adapter_of(resumed).items():
            torch.testing.assert_close(tensor, straight[key], rtol=0, atol=0)


@pytest.mark.parametrize("first", ["peft first", "peft last"])
@pytest.mark.parametrize("project", [Project, BuiltInSetup])
def test_averages_are_those_of_the_adapters(project, first, data, trainer, tmp_path) -> None:
    class Noted(L.Callback):
        """The adapter after each step, from which the average is worked out by hand."""

        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            self.seen.append(adapter_of(pl_module))

    class Mean(WeightAveraging):
        """Of the first two steps and the last."""

        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return step_idx in (0, 1, 3)

    model, noted = project(), Noted()
    callbacks = [PEFTCallback(LoRA(r=4), show=False), Mean(), noted]
    if first == "peft last":
        callbacks[:2] = reversed(callbacks[:2])
    run = trainer(*callbacks, max_epochs=1)
    run.fit(model, data, data)
    for key, tensor in adapter_of(model).items():
        mean = torch.stack([noted.seen[i][key] for i in (0, 1, 3)]).mean(0)
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-7)
    assert_base_is_untouched(model)


def test_a_merged_checkpoint_of_averaged_weights_holds_the_average(data, trainer, tmp_path) -> None:
    model = Project()
    ema, save = EMAWeightAveraging(decay=0.9), ModelCheckpoint(tmp_path, "merged", every_n_train_steps=4)
    run = trainer(PEFTCallback(LoRA(r=4), show=False, checkpoint="merged"), ema, save)
    run.fit(model, data, data)  # at its end, the module has the average
    merged = Project.load_from_checkpoint(tmp_path / "merged.ckpt").eval()
    x = torch.randn(4, 16)
    torch.testing.assert_close(merged(x), model.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beside", ["lr_finder", "batch_size_finder"])
def test_a_search_goes_back_to_its_start_whatever_checkpoints_hold(beside, trainer, tmp_path) -> None:
    model = Project()
    model.lr = 1e-2
    peft = PEFTCallback(LoRA(r=4), show=False, checkpoint="merged")
    run = trainer(peft, BESIDE[beside](), ModelCheckpoint(tmp_path, "merged"))
    run.fit(model, datamodule=ProjectData())
    x = torch.randn(4, 16)
    merged = Project.load_from_checkpoint(tmp_path / "merged.ckpt").eval()
    torch.testing.assert_close(merged(x), model.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings(r"ignore:`?\.fit\(ckpt_path=")  # Lightning takes this for a run that was cut off
def test_an_exception_leaves_a_checkpoint_to_go_on_from(data, trainer, peft, tmp_path) -> None:
    class Fails(Project):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.global_step == 2:
                raise ArithmeticError("at step 2")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(ArithmeticError):
        trainer(peft, OnExceptionCheckpoint(tmp_path, "failed"), max_epochs=2, enable_checkpointing=True).fit(
            model, data, data
        )
    assert set(torch.load(tmp_path / "failed.ckpt", weights_only=True)["state_dict"]) == OWN_KEYS
    loaded = load_from_checkpoint(Fails, tmp_path / "failed.ckpt")
    for key, tensor in adapter_of(model).items():
        assert_identical(adapter_of(loaded)[key], tensor)


@pytest.mark.parametrize("project", [Project, OnPEFTModule])
def test_best_last_and_every_few_steps_are_found_again(project, data, trainer, tmp_path) -> None:
    model = project()
    save = ModelCheckpoint(tmp_path, "{step}", monitor="val_loss", save_last=True, save_top_k=-1, every_n_train_steps=2)
    run = trainer(PEFTCallback(LoRA(r=4), show=False), save, max_epochs=2, val_check_interval=2)
    run.fit(model, data, data)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [
        "last.ckpt", *(f"step={n}.ckpt" for n in (2, 4, 6, 8)),
    ]  # fmt: skip
    last = adapter_of(model)
    for stage, which in itertools.product(("validate", "test", "predict"), ("best", "last", tmp_path / "step=2.ckpt")):
        getattr(run, stage)(model, data, ckpt_path=which)
        expected = {"best": save.best_model_path, "last": save.last_model_path}.get(str(which), which)
        for key, tensor in torch.load(expected, weights_only=True)["state_dict"].items():
            assert_identical(adapter_of(model)[key], tensor, key)
    run.test(model, data, ckpt_path="last")
    for key, tensor in last.items():
        assert_identical(adapter_of(model)[key], tensor, key)
    assert_base_is_untouched(model)


def test_training_does_not_resume_from_weights_alone(data, trainer, peft, tmp_path) -> None:
    run = trainer(peft, ModelCheckpoint(tmp_path, "weights", save_weights_only=True))
    run.fit(Project(), data, data)
    with pytest.raises(CheckpointError, match=r"weights only \(save_weights_only\).*load_from_checkpoint"):
        trainer(PEFTCallback(LoRA(r=4), show=False)).fit(Project(), data, data, ckpt_path=tmp_path / "weights.ckpt")
    trainer(PEFTCallback(LoRA(r=4), show=False)).test(Project(), data, ckpt_path=tmp_path / "weights.ckpt")


@pytest.mark.parametrize("first", ["peft first", "peft last"])
def test_a_callback_that_unfreezes_layers_is_refused_before_any_adapter_is_there(first, data, trainer) -> None:
    class Gradual(BaseFinetuning):
        def freeze_before_training(self, pl_module: L.LightningModule) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

    model = Project()
    callbacks = [PEFTCallback(LoRA(r=4), show=False), Gradual()]
    if first == "peft last":
        callbacks.reverse()
    with pytest.raises(ConfigError, match=r"Gradual freezes and unfreezes.*modules_to_save"):
        trainer(*callbacks).fit(model, data, data)
    assert type(model) is Project
    assert adapter_of(model) == {}


def test_the_summary_counts_the_adapter_as_trainable_and_the_base_as_not(data, trainer, peft, caplog) -> None:
    trainer(peft, ModelSummary()).fit(Project(), data, data)
    trains = sum(4 * (i + o) for i, o in ((16, 32), (32, 32), (32, 8)))
    assert re.search(rf"\b{trains}\s+Trainable params", caplog.text)


def test_learning_rates_are_monitored_and_only_the_trained_parameters_have_optimizer_states(
    data, trainer, tmp_path
) -> None:
    model = OnPEFTModule()
    run = trainer(PEFTCallback(LoRA(r=4), show=False), LearningRateMonitor(), logger=CSVLogger(tmp_path))
    run.fit(model, data, data)
    assert "lr-AdamW" in (Path(run.logger.log_dir) / "metrics.csv").read_text()
    assert len(run.optimizers[0].state) == len(OWN_KEYS)


def test_overfitting_batches_and_predicting_first_work(data, trainer, peft) -> None:
    model = Project()
    trainer(peft).predict(model, data)
    before = adapter_of(model)
    trainer(PEFTCallback(LoRA(r=4), show=False), overfit_batches=1, max_epochs=2).fit(model, data, data)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in adapter_of(model).items())


def test_an_adapter_injected_by_hand_is_trained_and_saved_without_the_callback(data, trainer, tmp_path) -> None:
    model = OnPEFTModule()  # its own hooks call no super()
    inject(model, LoRA(r=4))
    run = trainer()
    run.fit(model, data, data)
    run.save_checkpoint(tmp_path / "task.ckpt")
    assert set(torch.load(tmp_path / "task.ckpt", weights_only=True)["state_dict"]) == OWN_KEYS
    x = torch.randn(4, 16)
    assert_identical(OnPEFTModule.load_from_checkpoint(tmp_path / "task.ckpt").eval()(x), model.eval()(x))
