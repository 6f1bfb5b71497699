"""How the module is built, compiled and cast, and in which mode its frozen part trains."""

from collections.abc import Callable

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from project import BuiltInConfigureModel, BuiltInSetup, OnPEFTModule, Project, Steps, build_network
from snapshot import assert_identical
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import LoRA, PEFTCallback, PEFTModule, load_from_checkpoint
from lightning_peft.errors import CheckpointError, PEFTError


class WithDropout(Project):
    """Dropout in the base, noted in each training step."""

    def build(self) -> None:
        self.net = build_network()
        self.net[4] = nn.Dropout(0.5)
        self.seen: list[tuple[bool, ...]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.net[4].training, self.net[1].training, self.net[0].peft.training, self.training))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("mode", "dropout"), [("train", True), ("eval", False)])
@pytest.mark.parametrize("validates", [True, False])
def test_the_frozen_base_trains_in_the_mode_that_is_asked_for(mode, dropout, validates, data, trainer) -> None:
    model = WithDropout()
    peft = PEFTCallback(LoRA(r=4), show=False, frozen_mode=mode)
    options = {} if validates else {"limit_val_batches": 0}
    trainer(peft, max_epochs=2, val_check_interval=0.5 if validates else 1.0, **options).fit(model, data, data)
    # Dropout; the normalisation layer, whose own flag is left to the user; the adapter; the module itself.
    assert set(model.seen) == {(dropout, dropout, True, True)}
    for key, tensor in model.net[1].state_dict().items():
        assert_identical(tensor, build_network()[1].state_dict()[key], key)


def test_a_mode_the_user_has_set_is_kept(data, trainer) -> None:
    model = WithDropout()
    model.net[4].eval()
    with pytest.warns(UserWarning, match="eval mode"):  # Lightning's own, who finds it unusual
        trainer(PEFTCallback(LoRA(r=4), show=False)).fit(model, data, data)
    assert {seen[0] for seen in model.seen} == {False}


def test_what_is_trained_whole_stays_in_train_mode(data, trainer) -> None:
    class Head(WithDropout):
        def build(self) -> None:
            super().build()
            self.net[5] = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 8))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            assert self.net[5][0].training
            assert not self.net[4].training
            return super().training_step(batch, batch_idx)

    method = LoRA(r=4, target_modules=["0"], modules_to_save=["net.5"])
    trainer(PEFTCallback(method, show=False, frozen_mode="eval")).fit(Head(), data, data)


class Compiled(Project):
    def build(self) -> None:
        self.net = torch.compile(build_network(), backend="eager")


class CompiledLate(Project):
    def build(self) -> None:
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = torch.compile(build_network(), backend="eager")


class CompiledInPlace(Project):
    def build(self) -> None:
        self.net = build_network()
        self.net.compile(backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own tracing
@pytest.mark.parametrize("compiled", [Compiled, CompiledLate, CompiledInPlace])
def test_compiled_submodules_train_as_eager_ones_and_share_their_files(compiled, data, trainer, tmp_path) -> None:
    torch.compiler.reset()

    def fit(cls: type[Project]) -> tuple[Project, L.Trainer]:
        torch.manual_seed(0)
        model = cls()
        run = trainer(PEFTCallback(LoRA(r=4, target_modules=["net.0", "net.5"]), show=False))
        run.fit(model, data, data)
        run.save_checkpoint(tmp_path / f"{cls.__name__}.ckpt")
        return model.eval(), run

    model, _ = fit(compiled)
    eager, _ = fit(Project)
    saved = {
        name: torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in (compiled.__name__, "Project")
    }
    assert saved[compiled.__name__].keys() == saved["Project"].keys()
    for key, tensor in saved["Project"].items():
        torch.testing.assert_close(saved[compiled.__name__][key], tensor, rtol=1e-5, atol=1e-6)
    x = torch.randn(4, 16)
    for into, source in ((Project, compiled.__name__), (compiled, "Project"), (compiled, compiled.__name__)):
        loaded = load_from_checkpoint(into, tmp_path / f"{source}.ckpt").eval()
        torch.testing.assert_close(loaded(x), eager(x), rtol=1e-5, atol=1e-6)
        lp.merge(loaded)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_module_that_ran_compiled_before_takes_an_adapter() -> None:
    torch.compiler.reset()
    net = torch.compile(build_network().eval(), backend="eager")
    x = torch.randn(4, 16)
    before = net(x)
    lp.inject(net, LoRA(r=4, target_modules=["0"]))
    nn.init.ones_(net.get_submodule("0.peft.default").lora_B)
    assert not torch.allclose(net(x), before)
    with lp.disabled(net):
        torch.testing.assert_close(net(x), before)
    assert not torch.allclose(net(x), before)


class Replacing(Precision):
    """A precision plugin that replaces layers, as BitsandbytesPrecision does."""

    class Layer(nn.Linear): ...

    def convert_module(self, module: nn.Module) -> nn.Module:
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                layer = self.Layer(child.in_features, child.out_features)
                layer.load_state_dict(child.state_dict(), strict=False)
                setattr(module, name, layer)
            else:
                self.convert_module(child)
        return module


@pytest.mark.parametrize("project", [Project, BuiltInSetup, BuiltInConfigureModel, OnPEFTModule])
def test_layers_that_a_precision_plugin_replaces_are_replaced_before_they_are_adapted(project, data, trainer) -> None:
    model = project()
    trainer(PEFTCallback(LoRA(r=4), show=False), plugins=Replacing()).fit(model, data, data)
    assert isinstance(model.net[0], Replacing.Layer)
    assert model.net[0].peft.default.lora_B.abs().sum() > 0


def test_layers_that_are_replaced_after_they_were_adapted_are_an_error(data, trainer) -> None:
    class Early(OnPEFTModule):
        def __init__(self) -> None:
            super().__init__()
            lp.inject(self, LoRA(r=4))

    with pytest.raises(PEFTError, match=r"'net\.0' of Early was built anew.*BitsandbytesPrecision"):
        trainer(plugins=Replacing()).fit(Early(), data, data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning allows BitsandbytesPrecision on CUDA GPUs only")
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_adapters_train_on_a_base_that_bitsandbytes_quantizes(mode, data, trainer, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    from lightning.pytorch.plugins.precision import BitsandbytesPrecision

    plugin = BitsandbytesPrecision(mode, dtype=torch.bfloat16 if mode == "nf4" else torch.float16)
    model = Project()
    run = trainer(PEFTCallback(LoRA(r=4), show=False), plugins=plugin, accelerator="gpu", devices=1)
    run.fit(model, data, data)
    run.save_checkpoint(tmp_path / "task.ckpt")
    assert {tensor.dtype for key, tensor in model.state_dict().items() if "lora" in key} == {torch.float32}
    load_from_checkpoint(Project, tmp_path / "task.ckpt", map_location="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 training wants a GPU")
@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_adapters_train_in_half_precision_on_a_gpu(precision, data, trainer, tmp_path) -> None:
    model = Project()
    run = trainer(PEFTCallback(LoRA(r=4), show=False), precision=precision, accelerator="gpu", devices=1)
    run.fit(model, data, data)
    adapter = {key: tensor for key, tensor in model.state_dict().items() if "lora" in key}
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in adapter.values())


def test_a_class_without_a_network_when_it_is_loaded_is_told_where_to_build_it(data, trainer, peft, tmp_path) -> None:
    run = trainer(peft)
    run.fit(BuiltInSetup(), data, data)
    run.save_checkpoint(tmp_path / "task.ckpt")
    with pytest.raises(CheckpointError, match=r"BuiltInSetup has no network.*__init__ or in configure_model"):
        load_from_checkpoint(BuiltInSetup, tmp_path / "task.ckpt")


def test_hyperparameters_that_do_not_build_the_class_are_an_error_of_this_library(data, trainer, tmp_path) -> None:
    class NeedsSize(PEFTModule, Steps):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.net = nn.Linear(16, size)

    run = trainer(PEFTCallback(LoRA(r=4), show=False))
    run.fit(NeedsSize(8), data, data)
    run.save_checkpoint(tmp_path / "task.ckpt")  # it has saved no hyperparameters
    loads: list[Callable[..., nn.Module]] = [
        NeedsSize.load_from_checkpoint,
        lambda path, **given: load_from_checkpoint(NeedsSize, path, **given),
    ]
    for load in loads:
        with pytest.raises(CheckpointError, match=r"NeedsSize cannot be built .* 'size'"):
            load(tmp_path / "task.ckpt")
