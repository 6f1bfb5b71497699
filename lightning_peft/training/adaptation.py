"""The hooks of a LightningModule with adapters: when they are attached, and the checks on the way.

Lightning's order (see its Trainer): callback.setup, **module.setup**, **configure_model**, module.on_load_checkpoint,
load_state_dict. A network may be built in any of ``__init__``, ``setup`` and ``configure_model``, so adapters are
attached at the end of the last of these that the module has. Where a checkpoint is about to be restored, they wait for
it: on_load_checkpoint attaches them as the file describes them, and no time goes into values that would be replaced.
With ``save_weights_only`` no callback's hook runs, so the base is left out of a checkpoint in the module's own hook.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_peft.checkpoints.ckpt import METADATA_KEY, attach_metadata, has_adapters
from lightning_peft.core.method import Method
from lightning_peft.errors import CheckpointError
from lightning_peft.injection.registry import registries
from lightning_peft.network.walk import base_modules
from lightning_peft.training.checks import (
    GradientWatch,
    check_all_is_saved,
    check_all_run,
    check_loss,
    check_optimizers,
    check_still_there,
)
from lightning_peft.training.contents import check_content, keep_content
from lightning_peft.training.pending import (
    SETUP,
    AdapterSetup,
    check_restored,
    inject_pending,
    setup_of,
    waiting_methods,
)
from lightning_peft.training.trainer import renew_copies


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
        check_restored(self)
        if has_adapters(self):
            check_still_there(self)
            check_all_is_saved(self)
            check_optimizers(self.trainer, self)
            check_content(self, setup_of(self).checkpoint)
            self._stop_watching()  # an earlier fit may have been interrupted
            setup_of(self).watch = GradientWatch(self, self.trainer.optimizers)
        setup_of(self).fitting = True

    def on_validation_start(self) -> None:
        """Refuse to run without adapters that a file was to bring."""
        super().on_validation_start()
        check_restored(self)

    def on_test_start(self) -> None:
        """Refuse to run without adapters that a file was to bring."""
        super().on_test_start()
        check_restored(self)

    def on_predict_start(self) -> None:
        """Refuse to run without adapters that a file was to bring."""
        super().on_predict_start()
        check_restored(self)

    def on_train_start(self) -> None:
        """Put the base into its mode; not sooner, since Lightning warns of modules in eval mode when a fit starts."""
        super().on_train_start()
        if setup_of(self).frozen_mode == "eval":
            _hold_in_eval(self)

    def on_before_backward(self, loss: Tensor) -> None:
        """Raise if no adapter took part in the loss."""
        super().on_before_backward(loss)
        if has_adapters(self):
            check_loss(self, loss)

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
        waiting = waiting_methods(self)
        if METADATA_KEY in checkpoint:
            _check_resumable(self, checkpoint)
            attach_metadata(self, checkpoint[METADATA_KEY], checkpoint.get("state_dict", {}), waiting)
            if "current_model_state" in checkpoint:  # WeightAveraging's: what trained on, beside the averages
                attach_metadata(self, checkpoint[METADATA_KEY], checkpoint["current_model_state"])
            if self._trainer and waiting:
                renew_copies(self._trainer, self)
        elif waiting or has_adapters(self):
            raise CheckpointError(
                "This checkpoint holds no adapter; it looks like a full checkpoint of the base model. To start from "
                "these weights, give PEFTCallback(base_weights=PATH) in place of ckpt_path; or, to continue the full "
                "model without adapters, leave PEFTCallback out (--peft.method null)."
            )

    def on_last_adapter_removed(self) -> None:
        """Be the user's own class again once everything is merged or removed."""
        self.__dict__.pop(SETUP, None)
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
    module.__dict__[SETUP] = AdapterSetup(methods={**before.methods, name: method}, sources=sources, **options)


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
