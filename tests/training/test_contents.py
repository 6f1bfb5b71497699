"""What a ``.ckpt`` holds: the adapter, the merged model, or everything; and starting from other base weights."""

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from project import BuiltInConfigureModel, OnPEFTModule, Project, build_network
from safetensors.torch import save_file
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import BottleneckAdapter, LoRA, PEFTCallback, load_from_checkpoint
from lightning_peft.errors import AdapterKeyError, BaseMismatchError, CheckpointError, ConfigError, NotMergeableError


class OtherBase(Project):
    """The same network with other weights."""

    def build(self) -> None:
        self.net = build_network()
        for parameter in self.net.parameters():
            parameter.data.add_(0.1)


@pytest.fixture
def saved(data, trainer, tmp_path) -> Callable[..., tuple[L.LightningModule, Path]]:
    """Train a module and save it: (module in eval mode, path)."""

    def make(cls: type[L.LightningModule] = Project, **options: str) -> tuple[L.LightningModule, Path]:
        model = cls()
        save = ModelCheckpoint(tmp_path / "saved", "task", enable_version_counter=False)
        peft = PEFTCallback(LoRA(r=4, modules_to_save=["net.5"], target_modules=["0", "3"]), show=False, **options)
        trainer(peft, save, max_epochs=2).fit(model, data, data)
        return model.eval(), tmp_path / "saved/task.ckpt"

    return make


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if ".peft." not in key}


@pytest.mark.parametrize("project", [Project, BuiltInConfigureModel, OnPEFTModule])
def test_a_merged_checkpoint_is_the_untouched_classs_own(project, saved, data, trainer) -> None:
    model, path = saved(project, checkpoint="merged")
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(base_of(model))
    assert "lightning_peft" not in checkpoint
    assert "optimizer_states" not in checkpoint
    plain = project.load_from_checkpoint(path).eval()
    assert not any(".peft" in key for key in plain.state_dict())
    x = torch.randn(4, 16)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)
    trainer().test(plain, data, ckpt_path=path, verbose=False)
    # The module that was trained goes on with its own base.
    for key, tensor in build_network().state_dict().items():
        assert_identical(model.state_dict()[f"net.{key}"], tensor, key)


def test_a_full_checkpoint_brings_its_base_along_and_resumes_exactly(saved, data, trainer, tmp_path) -> None:
    model, path = saved(checkpoint="full")
    loaded = load_from_checkpoint(OtherBase, path).eval()
    x = torch.randn(4, 16)
    assert_identical(loaded(x), model(x))
    assert set(torch.load(path, weights_only=True)["state_dict"]) == set(model.state_dict())
    lp.remove(loaded)
    assert_identical(loaded(x), build_network().eval()(x))

    def fit(ckpt_path: Path | None) -> nn.Module:
        torch.manual_seed(0)
        project = Project() if ckpt_path is None else OtherBase()
        method = LoRA(r=4, modules_to_save=["net.5"], target_modules=["0", "3"])
        run = trainer(PEFTCallback(method, show=False, checkpoint="full"), max_epochs=2 if ckpt_path is None else 4)
        run.fit(project, data, data, ckpt_path=ckpt_path)
        if ckpt_path is None:
            run.save_checkpoint(tmp_path / "half.ckpt")
            run.fit_loop.max_epochs = 4
            run.fit(project, data, data, ckpt_path=tmp_path / "half.ckpt")
        return project

    straight, resumed = fit(None), fit(tmp_path / "half.ckpt")
    for key, tensor in straight.state_dict().items():
        assert_identical(resumed.state_dict()[key], tensor, key)


def test_a_full_checkpoint_with_a_part_of_the_base_is_refused(saved, tmp_path) -> None:
    _, path = saved(checkpoint="full")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["lightning_peft"]["checksum"], checkpoint["state_dict"]["net.3.weight"]
    torch.save(checkpoint, tmp_path / "part.ckpt")
    with pytest.raises(AdapterKeyError, match=r"lacks 1 of .* first 'net\.3\.weight'"):
        load_from_checkpoint(Project, tmp_path / "part.ckpt")


def test_what_cannot_be_merged_is_an_error_before_training(data, trainer) -> None:
    class NeverSteps(Project):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise AssertionError("a step was run")

    peft = PEFTCallback(BottleneckAdapter(target_modules=["0"]), show=False, checkpoint="merged")
    with pytest.raises(NotMergeableError, match="BottleneckAdapter"):
        trainer(peft).fit(NeverSteps(), data, data)


def test_options_out_of_range_or_in_contradiction_are_refused(data, trainer) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint='all' must be one of 'adapter', 'merged', 'full'"):
        PEFTCallback(LoRA(), checkpoint="all")
    with pytest.raises(ConfigError, match="frozen_mode='off'"):
        PEFTCallback(LoRA(), frozen_mode="off")
    pair = [PEFTCallback(LoRA(r=2), "a"), PEFTCallback(LoRA(r=2), "b", checkpoint="full")]
    with pytest.raises(ConfigError, match=r"'a' and 'b' train one module and must agree"):
        trainer(*pair).fit(Project(), data, data)


# Base weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lightning", "state_dict", "safetensors"])
def test_training_starts_from_base_weights_in_a_file(kind, data, trainer, tmp_path) -> None:
    base = OtherBase()
    path = tmp_path / ("base.safetensors" if kind == "safetensors" else "base.ckpt")
    if kind == "lightning":
        run = trainer()
        run.validate(base, data, verbose=False)
        run.save_checkpoint(path)
    elif kind == "safetensors":
        save_file(base.state_dict(), path)
    else:
        torch.save(base.state_dict(), path)
    model = Project()
    fitting = trainer(PEFTCallback(LoRA(r=4), show=False, base_weights=path))
    fitting.fit(model, data, data)
    for key, tensor in base.state_dict().items():
        assert_identical(model.state_dict()[key], tensor, key)
    fitting.save_checkpoint(tmp_path / "task.ckpt")
    x = torch.randn(4, 16)
    loaded = load_from_checkpoint(Project, tmp_path / "task.ckpt", base_weights=path)
    assert_identical(loaded.eval()(x), model.eval()(x))
    with pytest.raises(BaseMismatchError):
        load_from_checkpoint(Project, tmp_path / "task.ckpt")


def test_base_weights_that_do_not_fit_are_refused_and_change_nothing(saved, data, trainer, tmp_path) -> None:
    _, adapter = saved()
    state = Project().state_dict()
    other = {key: tensor for key, tensor in state.items() if key != "net.3.weight"}
    files = {
        "lacks 1 of 11 tensors of Project, first 'net.3.weight'": other,
        "holds 1 tensors .* first 'net.9.weight'": {**state, "net.9.weight": torch.ones(1)},
        r"'net.3.weight' has shape \[2, 2\] in the file and \[32, 32\]": {**state, "net.3.weight": torch.ones(2, 2)},
        "holds no weights": {"a": "text"},
    }
    for message, content in files.items():
        torch.save(content, tmp_path / "bad.ckpt")
        model = Project()
        before = Snapshot(model)
        with pytest.raises(CheckpointError, match=message):
            lp.training.base_weights.load_base_weights(model, tmp_path / "bad.ckpt")
        before.assert_same(model)
    for path, message in ((adapter, "lacks"), (tmp_path / "nowhere.ckpt", "There is no checkpoint")):
        with pytest.raises(CheckpointError, match=message):
            trainer(PEFTCallback(LoRA(r=4), show=False, base_weights=path)).fit(Project(), data, data)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_to_a_temporary_name_and_then_renamed(
    data, trainer, peft, tmp_path, monkeypatch
) -> None:
    run = trainer(peft)
    run.fit(Project(), data, data)
    run.save_checkpoint(tmp_path / "task.ckpt")
    whole = (tmp_path / "task.ckpt").read_bytes()
    written = torch.save

    def dies(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="no space"):
        run.save_checkpoint(tmp_path / "task.ckpt")
    assert (tmp_path / "task.ckpt").read_bytes() == whole
    monkeypatch.setattr(torch, "save", written)
    inodes = {(tmp_path / "task.ckpt").stat().st_ino}
    run.save_checkpoint(tmp_path / "task.ckpt")
    assert (tmp_path / "task.ckpt").stat().st_ino not in inodes  # another file took its place
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["task.ckpt"]


def test_checkpoints_written_in_the_background_are_whole_and_summed_too(data, trainer, tmp_path) -> None:
    model = Project()
    save = ModelCheckpoint(tmp_path / "saved", "task")
    run = trainer(PEFTCallback(LoRA(r=4), show=False), save, plugins=AsyncCheckpointIO())
    run.fit(model, data, data)
    run.strategy.teardown()
    checkpoint = torch.load(tmp_path / "saved/task.ckpt", weights_only=True)
    assert len(checkpoint["lightning_peft"]["checksum"]) == 64
    x = torch.randn(4, 16)
    assert_identical(load_from_checkpoint(Project, tmp_path / "saved/task.ckpt").eval()(x), model.eval()(x))


def test_an_edited_file_is_refused_and_says_how_to_mean_it(saved, data, trainer, tmp_path) -> None:
    _, path = saved()
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_peft"]["adapters"][":default"]["method"]["alpha"] = 32.0
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    message = r"edited\.ckpt is not what was written.*delete checkpoint\['lightning_peft'\]\['checksum'\]"
    with pytest.raises(CheckpointError, match=message):
        load_from_checkpoint(Project, tmp_path / "edited.ckpt")
    peft = PEFTCallback(LoRA(r=4, modules_to_save=["net.5"], target_modules=["0", "3"]), show=False)
    with pytest.raises(CheckpointError, match=message):
        trainer(peft).test(Project(), data, ckpt_path=tmp_path / "edited.ckpt")
    del checkpoint["lightning_peft"]["checksum"]
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    assert load_from_checkpoint(Project, tmp_path / "edited.ckpt").net[0].peft.default.scale == 8.0
