"""What adapters need of a Trainer: a strategy that keeps parameters whole, no rival callback, and safe files."""

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.training.files import SafeCheckpointIO


def check_trainer(trainer: L.Trainer) -> None:
    """Raise if adapters cannot be trained right under this Trainer.

    Raises:
        ConfigError: a callback freezes and unfreezes layers, as the adapters' own mechanism does.
        NotApplicableError: the strategy shards parameters.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise NotApplicableError(
            f"Trainer(strategy={type(strategy).__name__}) shards parameters over processes, where gradients of adapters"
            " would not be brought together. Use strategy='auto' on one device or 'ddp' on several: with a frozen base "
            "only the adapters have gradients and optimizer states."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        if isinstance(callback, BaseFinetuning):
            raise ConfigError(
                f"{type(callback).__name__} freezes and unfreezes layers while training, and so does PEFTCallback: the "
                "base would train and no adapter checkpoint would hold it. Leave it out; to train whole modules beside "
                "the adapters, name them in modules_to_save."
            )


def make_files_safe(trainer: L.Trainer) -> None:
    """Let the Trainer write each checkpoint whole or not at all, and check those that it reads."""
    outer, io = None, trainer.strategy.checkpoint_io
    while isinstance(io, _WrappingCheckpointIO) and io.checkpoint_io is not None:  # such as AsyncCheckpointIO
        outer, io = io, io.checkpoint_io
    if isinstance(io, (SafeCheckpointIO, _WrappingCheckpointIO)):
        return
    if outer is None:
        trainer.strategy.checkpoint_io = SafeCheckpointIO(io)
    else:
        outer._checkpoint_io = SafeCheckpointIO(io)  # its setter leaves a plugin alone that is there already


def renew_copies(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let the callbacks that average weights copy the module again: theirs is from before it had its adapters."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            callback.setup(trainer, module, stage=str(trainer.state.fn and trainer.state.fn.value))
