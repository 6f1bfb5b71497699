"""What adapters need of a Trainer: a strategy that keeps parameters whole, no rival callback, and safe files."""

import inspect
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.training.files import SafeCheckpointIO


def check_trainer(trainer: L.Trainer) -> None:
    """Raise if adapters cannot be trained right under this Trainer.

    Raises:
        ConfigError: a callback freezes and unfreezes layers, as the adapters' own mechanism does, or normalization
            layers are to be replaced.
        NotApplicableError: the strategy shards parameters.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise NotApplicableError(
            f"Trainer(strategy={type(strategy).__name__}) shards parameters over processes, where gradients of adapters"
            " would not be brought together. Use strategy='auto' on one device or 'ddp' on several: with a frozen base "
            "only the adapters have gradients and optimizer states."
        )
    if getattr(strategy, "_layer_sync", None):
        raise ConfigError(
            "Trainer(sync_batchnorm=True) replaces normalization layers after adapters were attached, and takes off "
            "what keeps the frozen ones in eval. Leave it out: frozen statistics are the same in every process."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        if isinstance(callback, BaseFinetuning):
            raise ConfigError(
                f"{type(callback).__name__} freezes and unfreezes layers while training, and so does PEFTCallback: the "
                "base would train and no adapter checkpoint would hold it. Leave it out; to train whole modules beside "
                "the adapters, name them in modules_to_save."
            )


def check_comes_back(trainer: L.Trainer) -> None:
    """Warn, or raise, if adapters attached now are in a process that ends with the run, and not in the caller's.

    ``ddp_spawn`` and its like hand the trained tensors back to the caller's module, which has no adapters to take them.

    Raises:
        NotApplicableError: no checkpoint would hold them either.
    """
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) or trainer.state.fn != TrainerFn.FITTING:
        return  # strategies that start scripts run fit in the caller's process, too
    what = (
        f"Under Trainer(strategy={type(trainer.strategy).__name__}) that starts its processes with "
        f"{trainer.strategy.launcher._start_method!r}, the adapters that PEFTCallback attaches stay in these: after "
        "fit, the module of the calling process has none"
    )
    remedy = "use strategy='ddp', or inject(module, method) before fit, beside PEFTCallback"
    if not trainer.checkpoint_callbacks:
        raise NotApplicableError(f"{what}, and no ModelCheckpoint would keep them. To have them, {remedy}.")
    rank_zero_warn(f"{what}. They are in the checkpoints (load_from_checkpoint). To have them in the module, {remedy}.")


def make_files_safe(trainer: L.Trainer) -> None:
    """Let the Trainer write each checkpoint whole or not at all, and check each one that it reads."""
    outer, io = None, trainer.strategy.checkpoint_io
    while isinstance(io, _WrappingCheckpointIO) and io.checkpoint_io is not None:  # such as AsyncCheckpointIO
        outer, io = io, io.checkpoint_io
    if isinstance(io, (SafeCheckpointIO, _WrappingCheckpointIO)):
        return
    if outer is None:
        trainer.strategy.checkpoint_io = SafeCheckpointIO(io)
    else:
        outer._checkpoint_io = SafeCheckpointIO(io)  # its setter leaves a plugin alone that is there already


def file_to_restore(trainer: L.Trainer) -> str | Path | None:
    """The checkpoint that the Trainer restores right after ``configure_model``; None if there is none, or unknown.

    Lightning tells no hook of it: until the file is read, ``trainer.ckpt_path`` is that of the call before. What
    ``"best"``, ``"last"`` and ``"hpc"`` stand for is decided before the run, whose local variable it is.
    """
    if trainer.strategy.restore_checkpoint_after_setup:  # too late for adapters: the optimizers are there by then
        return None
    run, frame = getattr(getattr(trainer, "_run", None), "__code__", None), inspect.currentframe()
    while frame and not (frame.f_code is run and frame.f_locals.get("self") is trainer):
        frame = frame.f_back
    # A Lightning that calls it otherwise makes it unknown, which costs time and nothing else.
    return frame.f_locals.get("ckpt_path") or None if frame else None


def renew_copies(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let the callbacks that average weights copy the module again: theirs is from before it had its adapters."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            callback.setup(trainer, module, stage=str(trainer.state.fn and trainer.state.fn.value))
