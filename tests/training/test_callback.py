import copy
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from project import BuiltInSetup, Project, build_network
from snapshot import assert_identical
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import LoRA, PEFTCallback
from lightning_peft.errors import AdapterNameError, ConfigError, OptimizerError


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in model.state_dict().items() if ".peft." in key}


def keys_of(path: Path) -> set[str]:
    return set(torch.load(path, weights_only=True)["state_dict"])


def test_wherever_the_network_is_built_the_base_is_frozen_and_only_the_adapter_trains(project, data, trainer, peft):
    model = project()
    trainer(peft, max_epochs=2).fit(model, data, data)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"net.{i}.peft.default.lora_{x}" for i in (0, 3, 5) for x in "AB"}
    for key, tensor in build_network().state_dict().items():  # running statistics of the BatchNorm included
        assert_identical(model.state_dict()[f"net.{key}"], tensor, key)
    assert all(model.state_dict()[f"net.{i}.peft.default.lora_B"].abs().sum() > 0 for i in (0, 3, 5))


@pytest.mark.compat
def test_every_way_to_save_leaves_the_base_out(project, data, trainer, peft, tmp_path):
    full = ModelCheckpoint(tmp_path / "full", "with_optimizer")
    weights = ModelCheckpoint(tmp_path / "weights", "weights", save_weights_only=True)
    trainer(peft, weights).fit(project(), data, data)
    model, fitting = project(), trainer(peft, full)
    fitting.fit(model, data, data)
    fitting.save_checkpoint(tmp_path / "by_hand.ckpt")
    fitting.save_checkpoint(tmp_path / "by_hand_weights.ckpt", weights_only=True)
    adapter = set(adapter_tensors(model))
    for name in ("full/with_optimizer", "weights/weights", "by_hand", "by_hand_weights"):
        assert keys_of(tmp_path / f"{name}.ckpt") == adapter
    assert "optimizer_states" in torch.load(tmp_path / "by_hand.ckpt", weights_only=True)
    assert "optimizer_states" not in torch.load(tmp_path / "weights/weights.ckpt", weights_only=True)


@pytest.mark.compat
def test_resuming_from_the_adapter_alone_ends_bit_equal_to_a_straight_run(project, data, trainer, tmp_path):
    def fit(epochs: int, ckpt_path: Path | None = None) -> Project:
        L.seed_everything(7)
        model, run = project(), trainer(PEFTCallback(LoRA(r=4), show=False), max_epochs=epochs)
        run.fit(model, data, data, ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    halfway, straight = fit(2), fit(4)
    resumed = fit(4, ckpt_path=tmp_path / "2.ckpt")
    assert not torch.equal(
        halfway.state_dict()["net.0.peft.default.lora_A"], straight.state_dict()["net.0.peft.default.lora_A"]
    )
    assert straight.state_dict().keys() == resumed.state_dict().keys()
    for key, tensor in straight.state_dict().items():
        assert_identical(resumed.state_dict()[key], tensor, key)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_stages_work_without_a_fit_and_from_a_checkpoint(project, data, trainer, peft, tmp_path, stage):
    fresh = project()
    getattr(trainer(peft), stage)(fresh, data)
    assert adapter_tensors(fresh)
    trained, fitting = project(), trainer(peft)
    fitting.fit(trained, data, data)
    fitting.save_checkpoint(tmp_path / "task.ckpt")
    loaded = project()
    getattr(trainer(peft), stage)(loaded, data, ckpt_path=tmp_path / "task.ckpt")
    for key, tensor in adapter_tensors(trained).items():
        assert_identical(adapter_tensors(loaded)[key], tensor, key)


def test_fitting_twice_continues_the_same_adapter(project, data, trainer, peft):
    model = project()
    trainer(peft).fit(model, data, data)
    first = {key: tensor.clone() for key, tensor in adapter_tensors(model).items()}
    trainer(PEFTCallback(LoRA(r=4), show=False)).fit(model, data, data)
    second = adapter_tensors(model)
    assert first.keys() == second.keys()
    assert not torch.equal(first["net.0.peft.default.lora_B"], second["net.0.peft.default.lora_B"])
    assert len(model.net[0]._forward_hooks) == 1


def test_the_module_keeps_its_class_its_name_and_can_be_copied_and_pickled(data, trainer, peft):
    model = Project()
    trainer(peft).fit(model, data, data)
    model.eval()
    assert isinstance(model, Project)
    assert type(model).__name__ == "Project"
    x = torch.randn(3, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_identical(twin(x), model(x))
        twin.net[0].peft.default.lora_B.data.zero_()
        assert not torch.equal(twin(x), model(x))


def test_merging_gives_the_users_own_class_keys_and_outputs_back(project, data, trainer, peft):
    model = project()
    trainer(peft, max_epochs=2).fit(model, data, data)
    model.eval()
    x = torch.randn(5, 16)
    before = model(x)
    lp.merge(model)
    assert type(model) is project
    assert set(model.state_dict()) == {f"net.{key}" for key in build_network().state_dict()}
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_a_method_the_whole_model_trains_and_is_saved(data, trainer, tmp_path):
    model, fitting = Project(), trainer(PEFTCallback(None))
    fitting.fit(model, data, data)
    fitting.save_checkpoint(tmp_path / "full.ckpt")
    assert type(model) is Project
    assert keys_of(tmp_path / "full.ckpt") == set(model.state_dict())
    assert not torch.equal(model.net[0].weight, build_network()[0].weight)


def test_two_callbacks_train_two_adapters_together(data, trainer, tmp_path):
    model = Project()
    first = PEFTCallback(LoRA(r=2, target_modules=["net.0"]), name="first", show=False)
    second = PEFTCallback(LoRA(r=2, target_modules=["net.0", "net.3"]), name="second", show=False)
    fitting = trainer(first, second)
    fitting.fit(model, data, data)
    fitting.save_checkpoint(tmp_path / "both.ckpt")
    assert lp.active_adapters(model) == ("first", "second")
    assert keys_of(tmp_path / "both.ckpt") == {
        f"net.{place}.lora_{x}" for place in ("0.peft.first", "0.peft.second", "3.peft.second") for x in "AB"
    }


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_in_low_precision_the_adapter_stays_fp32_and_resumes_bit_exact(data, trainer, tmp_path, precision, dtype):
    model = Project()
    fitting = trainer(PEFTCallback(LoRA(r=4), show=False), precision=precision)
    fitting.fit(model, data, data)
    assert model.net[0].weight.dtype == dtype
    adapter = adapter_tensors(model)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    fitting.save_checkpoint(tmp_path / "low.ckpt")
    saved = torch.load(tmp_path / "low.ckpt", weights_only=True)["state_dict"]
    resumed = Project()
    trainer(PEFTCallback(LoRA(r=4), show=False), precision=precision).test(
        resumed, data, ckpt_path=tmp_path / "low.ckpt", verbose=False
    )
    for key, tensor in adapter.items():
        assert_identical(saved[key], tensor, key)
        assert_identical(adapter_tensors(resumed)[key], tensor, key)


def test_a_table_of_what_trains_is_shown_before_training(data, trainer, capsys):
    trainer(PEFTCallback(LoRA(r=4))).fit(Project(), data, data)
    shown = capsys.readouterr().out
    assert "LoRA" in shown
    assert f"{4 * (16 + 32 + 32 + 32 + 32 + 8):,} of" in shown
    assert "frozen" in shown


# Errors ---------------------------------------------------------------------------------------------------------------


def test_a_trainable_parameter_in_no_optimizer_is_an_error_before_the_first_step(data, trainer, peft):
    class Forgetful(Project):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.net[5].parameters(), lr=1e-3)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise AssertionError("a step was run")

    with pytest.raises(OptimizerError, match=r"4 of 6 .*net\.0\.peft\.default\.lora_A.*configure_optimizers"):
        trainer(peft).fit(Forgetful(), data, data)


def test_a_network_built_anew_at_each_stage_is_an_error_not_a_loss(data, trainer, peft):
    class Careless(BuiltInSetup):
        def setup(self, stage: str) -> None:
            self.net = build_network()

    model = Careless()
    run = trainer(peft)
    run.fit(model, data, data)
    with pytest.raises(lp.PEFTError, match=r"net\.0.* was built anew"):
        run.test(model, data)


def test_another_method_under_a_taken_name_is_an_error(data, trainer, peft):
    model = Project()
    trainer(peft).fit(model, data, data)
    with pytest.raises(AdapterNameError, match=r"'default'.*r=4.*r=8"):
        trainer(PEFTCallback(LoRA(r=8))).fit(model, data, data)


def test_two_callbacks_of_one_name_are_an_error(data, trainer, peft):
    with pytest.raises(ConfigError, match=r"two PEFTCallbacks .*'default'.*name="):
        trainer(peft, PEFTCallback(LoRA(r=2))).fit(Project(), data, data)


def test_what_is_no_method_is_refused():
    with pytest.raises(ConfigError, match=r"LoRA\(r=8\)"):
        PEFTCallback("LoRA")
