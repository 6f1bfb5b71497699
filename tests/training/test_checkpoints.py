"""Loading adapter checkpoints: what must work, and what must be refused with the model left as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from project import BuiltInConfigureModel, Project, Steps, build_network
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import LoRA, PEFTCallback, PEFTModule, load_from_checkpoint
from lightning_peft.errors import AdapterKeyError, BaseMismatchError, CheckpointError, ConfigError


class OwnModule(PEFTModule, Steps):
    """A project written on PEFTModule; the method comes from the callback or from the file."""

    def __init__(self, width: int = 32, lr: float = 1e-2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.net = build_network()
        self.width = width


@pytest.fixture
def trained(data, trainer, tmp_path) -> Callable[..., tuple[L.LightningModule, Path]]:
    """Train a module for an epoch and save it: (module in eval mode, path of its checkpoint)."""

    def train(cls: type[L.LightningModule] = Project, **fields: Any) -> tuple[L.LightningModule, Path]:
        model = cls()
        run = trainer(PEFTCallback(LoRA(**{"r": 4, **fields}), show=False))
        run.fit(model, data, data)
        run.save_checkpoint(tmp_path / "task.ckpt")
        return model.eval(), tmp_path / "task.ckpt"

    return train


@pytest.fixture
def edited(trained, tmp_path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """A trained checkpoint whose content went through a function."""

    def edit(change: Callable[[dict[str, Any]], None]) -> Path:
        _, path = trained()
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["lightning_peft"].pop("checksum")  # as someone does who means it
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "edited.ckpt")
        return tmp_path / "edited.ckpt"

    return edit


@pytest.mark.parametrize("project", [Project, BuiltInConfigureModel])  # Lightning runs no setup() when it loads
def test_an_untouched_class_is_loaded_from_the_adapter_alone(project, trained):
    model, path = trained(project)
    loaded = load_from_checkpoint(project, path).eval()
    x = torch.randn(4, 16)
    assert isinstance(loaded, project)
    assert_identical(loaded(x), model(x))
    lp.merge(loaded)
    assert type(loaded) is project
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_hyperparameters_come_from_the_file_and_arguments_override_them(data, trainer, tmp_path, peft):
    model, run = Project(lr=0.5), trainer(peft)
    run.fit(model, data, data)
    run.save_checkpoint(tmp_path / "task.ckpt")
    assert load_from_checkpoint(Project, tmp_path / "task.ckpt").hparams["lr"] == 0.5
    assert load_from_checkpoint(Project, str(tmp_path / "task.ckpt"), lr=0.1).hparams["lr"] == 0.1


def test_a_peft_module_loads_itself_and_trains_on(trained, data, trainer):
    model, path = trained(OwnModule, dropout=0.1, rank_pattern={"net.3": 2})
    loaded = OwnModule.load_from_checkpoint(path).eval()
    x = torch.randn(4, 16)
    assert isinstance(loaded, OwnModule)
    assert_identical(loaded(x), model(x))
    trainer(max_epochs=1).fit(loaded.train(), data, data)
    assert not torch.equal(loaded.eval()(x), model(x))
    loaded.merge()
    assert loaded.state_dict().keys() == OwnModule().state_dict().keys()


def test_a_peft_module_without_adapters_is_an_ordinary_module(data, trainer, tmp_path):
    model, run = OwnModule(), trainer()
    run.fit(model, data, data)
    run.save_checkpoint(tmp_path / "full.ckpt")
    x = torch.randn(4, 16)
    assert_identical(OwnModule.load_from_checkpoint(tmp_path / "full.ckpt").eval()(x), model.eval()(x))


def test_adapters_injected_below_the_module_are_filtered_and_loaded_too(data, trainer, tmp_path):
    class Inner(OwnModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()
            lp.inject(self.net, LoRA(r=2))

    model, run = Inner(), trainer()
    run.fit(model, data, data)
    run.save_checkpoint(tmp_path / "inner.ckpt")
    keys = set(torch.load(tmp_path / "inner.ckpt", weights_only=True)["state_dict"])
    assert keys == {f"net.{i}.peft.default.lora_{x}" for i in (0, 3, 5) for x in "AB"}
    x = torch.randn(4, 16)
    assert_identical(Inner.load_from_checkpoint(tmp_path / "inner.ckpt").eval()(x), model.eval()(x))


def test_what_trains_beside_the_adapters_is_refused_since_no_checkpoint_would_hold_it(data, trainer):
    class HalfFrozen(OwnModule):
        def __init__(self) -> None:
            super().__init__()
            lp.inject(self.net, LoRA(r=2))
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x))

    with pytest.raises(lp.PEFTError, match=r"2 parameters train .*'head\.weight'.*modules_to_save"):
        trainer().fit(HalfFrozen(), data, data)
    with pytest.raises(lp.PEFTError, match=r"'head\.weight'"):
        HalfFrozen().on_save_checkpoint({"state_dict": {}})


def test_the_optimizer_of_a_peft_module_holds_what_trains_and_decays_matrices_only():
    model = OwnModule()
    model.weight_decay = 0.3
    lp.inject(model, LoRA(r=4, modules_to_save=["5"]))
    optimizer = model.configure_optimizers()
    held = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p): 0.3 if p.dim() > 1 else 0.0 for p in model.trainable_parameters()}


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)]
)
def test_the_learning_rate_rises_and_decays(schedule, middle, end):
    model = PEFTModule(lr=1.0, warmup=0.2, schedule=schedule)
    assert [round(model._factor(step, 100), 4) for step in (0, 9)] == [round(1 / 21, 4), round(10 / 21, 4)]
    assert model._factor(20, 100) == 1.0
    assert model._factor(60, 100) == pytest.approx(middle)
    assert model._factor(100, 100) == pytest.approx(end)


@pytest.mark.parametrize("field", [{"lr": 0.0}, {"weight_decay": -1.0}, {"warmup": 1.0}, {"schedule": "cubic"}])
def test_optimizer_settings_out_of_range_are_refused(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        PEFTModule(**field)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_whatever_its_length(trained, tmp_path, data, trainer, peft):
    _, path = trained()
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.ckpt").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            load_from_checkpoint(Project, tmp_path / "cut.ckpt")
        with pytest.raises(CheckpointError, match="truncated"):
            OwnModule.load_from_checkpoint(tmp_path / "cut.ckpt")
        with pytest.raises(CheckpointError, match="truncated"):
            trainer(peft).fit(Project(), data, data, ckpt_path=tmp_path / "cut.ckpt")


def test_a_missing_file_is_refused(tmp_path, data, trainer, peft):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_from_checkpoint(Project, tmp_path / "nowhere.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trainer(peft).test(Project(), data, ckpt_path=tmp_path / "nowhere.ckpt")


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was_run",))

    torch.save({"state_dict": {}, "lightning_peft": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_from_checkpoint(Project, tmp_path / "evil.ckpt")
    assert not (tmp_path / "was_run").exists()


@pytest.fixture
def full(data, trainer, tmp_path) -> Path:
    run = trainer()
    run.fit(Project(), data, data)
    run.save_checkpoint(tmp_path / "full.ckpt")
    return tmp_path / "full.ckpt"


def test_a_full_checkpoint_where_an_adapter_belongs_is_refused(full, data, trainer, peft):
    with pytest.raises(CheckpointError, match=r"holds no adapter.*Project\.load_from_checkpoint"):
        load_from_checkpoint(Project, full)
    model = Project()
    with pytest.raises(CheckpointError, match="full checkpoint of the base"):
        trainer(peft).fit(model, data, data, ckpt_path=full)
    for key, tensor in build_network().state_dict().items():
        assert_identical(model.state_dict()[f"net.{key}"], tensor, key)


def test_another_base_is_refused_naming_the_tensor(trained, data, trainer, peft):
    class OtherWeights(Project):
        def build(self) -> None:
            super().build()
            self.net[3].weight.data.normal_()

    class OtherShape(Project):
        def build(self) -> None:
            super().build()
            self.net[5] = nn.Linear(32, 9)

    _, path = trained()
    with pytest.raises(BaseMismatchError, match=r"'net\.3\.weight' differ"):
        load_from_checkpoint(OtherWeights, path)
    with pytest.raises(BaseMismatchError, match=r"'net\.3\.weight' differ"):
        trainer(peft).fit(OtherWeights(), data, data, ckpt_path=path)
    with pytest.raises(BaseMismatchError, match=r"'net\.5\.weight' has shape \[9, 32\] here and \[8, 32\]"):
        load_from_checkpoint(OtherShape, path)


def test_another_method_than_the_files_is_refused_naming_the_field(trained, data, trainer):
    _, path = trained()
    model = Project()
    with pytest.raises(CheckpointError, match="r is 4 in the file and 8 here"):
        trainer(PEFTCallback(LoRA(r=8), show=False)).test(model, data, ckpt_path=path)
    with pytest.raises(CheckpointError, match="holds no adapter 'other'"):
        trainer(PEFTCallback(LoRA(r=4), name="other", show=False)).test(Project(), data, ckpt_path=path)


def test_missing_left_over_and_misshapen_tensors_are_refused(edited, data, trainer, peft):
    key = "net.3.peft.default.lora_B"
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        f"lacks 1 of 6 adapter tensors, first '{key}'": lambda c: c["state_dict"].pop(key),
        "holds 1 tensors .* first 'net.9.weight'": lambda c: c["state_dict"].update({"net.9.weight": torch.ones(2)}),
        rf"'{key}' is \[3, 3\] .* \[32, 4\]": lambda c: c["state_dict"].update({key: torch.ones(3, 3)}),
        f"'{key}' is str": lambda c: c["state_dict"].update({key: "text"}),
    }
    for change in (lambda c: c.update(state_dict=3), lambda c: c["state_dict"].update({3: torch.ones(1)})):
        with pytest.raises(CheckpointError, match="'state_dict' of this file is damaged"):
            load_from_checkpoint(Project, edited(change))
    for message, change in changes.items():
        path = edited(change)
        with pytest.raises(AdapterKeyError, match=message):
            load_from_checkpoint(Project, path)
        with pytest.raises(AdapterKeyError, match=message):
            trainer(PEFTCallback(peft.method, show=False)).fit(Project(), data, data, ckpt_path=path)


def test_a_damaged_record_is_refused_and_the_model_left_as_it_was(edited):
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda r: r.pop("version"),
        lambda r: r.update(version=99),
        lambda r: r.update(version="1"),
        lambda r: r.pop("adapters"),
        lambda r: r.update(adapters=3),
        lambda r: r["adapters"][":default"].pop("method"),
        lambda r: r["adapters"][":default"].update(path="nowhere"),
        lambda r: r["adapters"][":default"]["method"].update(method="torch.nn.Linear"),
        lambda r: r["adapters"][":default"]["method"].update(r="8"),
        lambda r: r["adapters"][":default"]["method"].update(r=None),
        lambda r: r["adapters"][":default"]["method"].update(surprise=1),
        lambda r: r["adapters"][":default"]["method"].update(target_modules=["nowhere"]),
        lambda r: r.pop("base"),
        lambda r: r["base"].pop("samples"),
        lambda r: r["base"].update(names=7),
        lambda r: r["base"].update(names=["a"]),
        lambda r: r["base"].update(samples="text"),
    ]
    for change in changes:
        path = edited(lambda c, change=change: change(c["lightning_peft"]))
        model = OwnModule()
        before = Snapshot(model)
        with pytest.raises(lp.PEFTError):
            model.on_load_checkpoint(torch.load(path, weights_only=True))
        before.assert_same(model)
        with pytest.raises(lp.PEFTError):
            load_from_checkpoint(Project, path)
