"""The hooks of a LightningModule with adapters: when they are attached, and the checks on the way.

Lightning's order (see its Trainer): callback.setup, **module.setup**, **configure_model**, module.on_load_checkpoint,
load_state_dict. A network may be built in any of ``__init__``, ``setup`` and ``configure_model``, so adapters are
attached at the end of the last of these that the module has. With ``save_weights_only`` no callback's hook runs, so the
base is left out of a checkpoint in the module's own hook.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_peft.checkpoints.ckpt import METADATA_KEY, attach_metadata, has_adapters
from lightning_peft.core.method import Method
from lightning_peft.errors import AdapterNameError, CheckpointError
from lightning_peft.injection.inject import inject
from lightning_peft.injection.registry import registries, registry_of
from lightning_peft.network.walk import base_modules
from lightning_peft.training.base_weights import load_base_weights
from lightning_peft.training.checks import (
    GradientWatch,
    check_all_is_saved,
    check_all_run,
    check_optimizers,
    check_still_there,
)
from lightning_peft.training.contents import Content, check_content, keep_content
from lightning_peft.training.continuing import continue_adapter
from lightning_peft.training.trainer import check_comes_back, check_trainer, make_files_safe, renew_copies

FrozenMode = Literal["train", "eval"]
_SETUP = "_peft_setup"


@dataclass
class AdapterSetup:
    """The adapters and options that wait for a module's network; several PEFTCallbacks share one."""

    methods: dict[str, Method | None] = field(default_factory=dict)
    """What to inject, by the adapter's name; None for the method of the file that it starts from."""
    checkpoint: Content = "adapter"
    frozen_mode: FrozenMode = "train"
    base_weights: str | Path | None = None
    sources: dict[str, str | Path] = field(default_factory=dict)
    """Files that adapters start from, by the adapter's name."""
    watch: GradientWatch | None = None
    fitting: bool = False
    """True if ``fit`` is past its start."""


class Adapted(L.LightningModule if TYPE_CHECKING else object):  # type: ignore[misc]
    """The hooks of a LightningModule with adapters, put before the module's own class by :func:`prepare_module`."""

    def setup(self, stage: str) -> None:
        """Set the module up, then attach what waits."""
        super().setup(stage)
        if not is_overridden("configure_model", self):
            inject_pending(self)

    def on_fit_start(self) -> None:
        """Refuse to train what no optimizer or no checkpoint holds."""
        super().on_fit_start()
        if has_adapters(self):
            check_still_there(self)
            check_all_is_saved(self)
            check_optimizers(self.trainer, self)
            check_content(self, setup_of(self).checkpoint)
            self._stop_watching()  # an earlier fit may have been interrupted
            setup_of(self).watch = GradientWatch(self, self.trainer.optimizers)
        setup_of(self).fitting = True

    def on_train_start(self) -> None:
        """Put the base into its mode; not sooner, since Lightning warns of modules in eval mode when a fit starts."""
        super().on_train_start()
        if setup_of(self).frozen_mode == "eval":
            _hold_in_eval(self)

    def on_after_backward(self) -> None:
        """Raise after the first backward if an adapter got no gradient."""
        super().on_after_backward()
        watch = setup_of(self).watch
        if watch and self.automatic_optimization:
            setup_of(self).watch = None
            watch.check()

    def on_train_epoch_end(self) -> None:
        """The same in manual optimization, where an optimizer may have its turn only every few batches."""
        super().on_train_epoch_end()
        watch = setup_of(self).watch
        if watch and watch.check_stepped():
            setup_of(self).watch = None

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Warn of layers that have not run, also where the module is tested or predicts; in training gradients tell."""
        super().on_validation_batch_end(*args, **kwargs)
        if self.trainer.state.fn != TrainerFn.FITTING:
            check_all_run(self)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The same."""
        super().on_test_batch_end(*args, **kwargs)
        check_all_run(self)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The same."""
        super().on_predict_batch_end(*args, **kwargs)
        check_all_run(self)

    def on_fit_end(self) -> None:
        """Leave no hook behind, though an optimizer has never had its turn."""
        super().on_fit_end()
        self._stop_watching()

    def _stop_watching(self) -> None:
        setup = setup_of(self)
        watch, setup.watch = setup.watch, None
        if watch:
            watch.stop()

    def train(self, mode: bool = True) -> Any:
        """Set the mode; with ``frozen_mode="eval"`` frozen modules stay in eval."""
        super().train(mode)
        if setup_of(self).frozen_mode == "eval":
            _hold_in_eval(self)
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen base out, or whatever else was chosen."""
        super().on_save_checkpoint(checkpoint)
        if has_adapters(self):
            check_all_is_saved(self)
            # The callbacks that search for a learning rate or a batch size save before the start, to go back there.
            searching = (
                bool(self._trainer) and self.trainer.state.fn == TrainerFn.FITTING and not setup_of(self).fitting
            )
            keep_content(self, checkpoint, "adapter" if searching else setup_of(self).checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Attach the checkpoint's adapters, or check that it fits the attached ones."""
        super().on_load_checkpoint(checkpoint)
        if METADATA_KEY in checkpoint:
            _check_resumable(self, checkpoint)
            attach_metadata(self, checkpoint[METADATA_KEY], checkpoint.get("state_dict", {}))
            if "current_model_state" in checkpoint:  # WeightAveraging's: what trained on, beside the averages
                attach_metadata(self, checkpoint[METADATA_KEY], checkpoint["current_model_state"])
        elif has_adapters(self):
            raise CheckpointError(
                "This checkpoint holds no adapter; it looks like a full checkpoint of the base model. To start from "
                "these weights, give PEFTCallback(base_weights=PATH) in place of ckpt_path; or, to continue the full "
                "model without adapters, leave PEFTCallback out (--peft.method null)."
            )

    def on_last_adapter_removed(self) -> None:
        """Be the user's own class again once everything is merged or removed."""
        self.__dict__.pop(_SETUP, None)
        original = getattr(type(self), "_peft_original", None)
        if original and not getattr(original, "always_adapted", False):
            self.__class__ = original

    def __reduce__(self) -> tuple[Any, ...]:
        # A class made at run time cannot be found by name when it is unpickled: say how to make it again.
        return _rebuild, (type(self)._peft_original,), self.__getstate__()


class AdaptedLate(Adapted):
    """The same where the module has a ``configure_model``, which runs after ``setup``."""

    def configure_model(self) -> None:
        """Build the network, then attach what waits."""
        super().configure_model()
        if self._current_fx_name != "setup":  # WeightAveraging calls it before its time
            inject_pending(self)


def adapted_class(cls: Any) -> type:
    """The subclass of a LightningModule class whose instances carry adapters; the class itself if it does already."""
    return cls if issubclass(cls, Adapted) else _subclass(cls)  # classes are hashable


@cache
def _subclass(cls: Any) -> type:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    hooks = AdaptedLate if is_overridden("configure_model", cls, L.LightningModule) else Adapted
    return type(cls.__name__, (hooks, cls), {**names, "_peft_original": cls})


def prepare_module(
    module: nn.Module, name: str, method: Method | None, source: str | Path | None = None, **options: Any
) -> None:
    """Make ``module`` carry adapters, and let ``method`` wait until its network is built.

    Args:
        module: a LightningModule.
        name: the adapter's name.
        method: what to inject.
        source: the file that the adapter starts from.
        options: other fields of :class:`AdapterSetup`.
    """
    module.__class__ = adapted_class(type(module))
    before = setup_of(module)
    sources = {**before.sources, name: source} if source else before.sources
    module.__dict__[_SETUP] = AdapterSetup(methods={**before.methods, name: method}, sources=sources, **options)


def setup_of(module: nn.Module) -> AdapterSetup:
    """The setup that waits for ``module``; an empty one is made if there is none."""
    return module.__dict__.setdefault(_SETUP, AdapterSetup())


def inject_pending(module: L.LightningModule) -> None:
    """Attach the methods that wait. Attached ones are left as they are, so every stage may call this.

    Raises:
        AdapterNameError: another method is attached under that name.
        PEFTError: the network was built anew, so trained adapters would be lost.
    """
    setup, trainer = setup_of(module), module._trainer
    if trainer and (setup.methods or has_adapters(module)):
        check_trainer(trainer)
        make_files_safe(trainer)
        # A plugin that replaces layers (BitsandbytesPrecision) would do so in strategy.setup, and drop their adapters.
        trainer.precision_plugin.convert_module(module)
    check_still_there(module)
    # A module may be set up again for every stage, with its adapters already there.
    own = registry_of(module)
    attached = own.attachments if own else {}
    for name in attached.keys() & setup.methods.keys():
        if (wanted := setup.methods[name]) and attached[name].method.to_config() != wanted.to_config():
            raise AdapterNameError(
                f"{type(module).__name__} has an adapter {name!r} already, {attached[name].method}, and PEFTCallback "
                f"asks for {wanted}. Give the new one another name, or remove(model, {name!r}) first."
            )
    if setup.base_weights and not has_adapters(module):
        load_base_weights(module, setup.base_weights)
    waiting = {name: method for name, method in setup.methods.items() if name not in attached}
    if trainer and waiting:
        check_comes_back(trainer)
    for name, method in waiting.items():
        if name in setup.sources:
            continue_adapter(module, setup.sources[name], name, method)
        else:
            inject(module, method, name)  # type: ignore[arg-type]
    if trainer and waiting:
        renew_copies(trainer, module)


def _check_resumable(module: Any, checkpoint: dict[str, Any]) -> None:
    trainer = module._trainer
    if trainer and trainer.state.fn == TrainerFn.FITTING and "optimizer_states" not in checkpoint:
        raise CheckpointError(
            "This checkpoint holds weights only (save_weights_only), so training cannot be resumed from it. To start a "
            "new run from its weights: model = load_from_checkpoint(cls, path), then fit without ckpt_path."
        )


def _hold_in_eval(module: nn.Module) -> None:
    """Put the frozen base of ``module`` into eval mode: all but itself, adapters and fully trained modules."""
    whole: set[int] = {id(module)}
    for _, owner, registry in registries(module):
        for attachment in registry.attachments.values():
            for path in attachment.fully_trained:
                whole.update(map(id, owner.get_submodule(path).modules()))
    for _, below in base_modules(module):
        if id(below) not in whole:
            below.training = False


def _rebuild(cls: type) -> Any:
    adapted: Any = adapted_class(cls)
    return object.__new__(adapted)
