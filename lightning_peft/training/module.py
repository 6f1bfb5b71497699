"""``PEFTModule``, a LightningModule base with adapter-only checkpoints, and loading for classes that do not use it."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lightning_peft.checkpoints.ckpt import METADATA_KEY, attach_metadata
from lightning_peft.errors import CheckpointError, ConfigError, PEFTError
from lightning_peft.merging.merge import merge
from lightning_peft.training.adaptation import adapted_class
from lightning_peft.training.base_weights import load_base_weights
from lightning_peft.training.files import read_adapter_checkpoint, read_checkpoint

ModuleT = TypeVar("ModuleT", bound=L.LightningModule)


class PEFTModule(L.LightningModule):
    """A LightningModule whose checkpoints hold its adapters alone, and which can be loaded from them.

    Adapters come from :class:`~lightning_peft.PEFTCallback`, from :func:`~lightning_peft.inject` in ``__init__``, or
    from the checkpoint. Without any it is an ordinary LightningModule. Subclasses may override every hook.

    Args:
        lr: peak learning rate, greater than 0.
        weight_decay: decoupled weight decay of AdamW, at least 0; vectors (biases, scales) are not decayed.
        warmup: share of all steps over which the learning rate rises from 0, at least 0 and less than 1.
        schedule: what follows the warm-up: ``"constant"``, or ``"linear"`` or ``"cosine"`` decay to 0 at the last step.

    Raises:
        ConfigError: an argument is out of range.
    """

    always_adapted: ClassVar[bool] = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # The hooks stand before the subclass's own, so that none of these can forget to call them.
        return super().__new__(adapted_class(cls))

    def __init__(
        self,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
    ) -> None:
        super().__init__()
        for name, value, good in (
            ("lr", lr, lr > 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("warmup", warmup, 0 <= warmup < 1),
            ("schedule", schedule, schedule in ("constant", "linear", "cosine")),
        ):
            if not good:
                raise ConfigError(f"{type(self).__name__}: {name}={value!r} is out of range; see its documentation.")
        self.lr, self.weight_decay, self.warmup, self.schedule = lr, weight_decay, warmup, schedule

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train: the adapters' own, once they are attached."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def merge(self, name: str = "default") -> None:
        """Fold the adapter ``name`` into the base, as :func:`~lightning_peft.merge` does."""
        merge(self, name)

    @override
    def configure_optimizers(self) -> Any:
        parameters = list(self.trainable_parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr)
        # A constant rate needs no number of steps, which a run without an end does not have.
        if self.schedule == "constant" and not self.warmup:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, lambda step: self._factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _factor(self, step: int, steps: int) -> float:
        """The share of ``lr`` at ``step`` of ``steps``."""
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        done = min(1.0, (step - rise) / max(1, steps - rise))
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.schedule]

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Build the module from the checkpoint's hyperparameters (and ``kwargs``), attach its adapters and load them.

        Raises:
            CheckpointError: the file cannot be read, or does not fit.
        """
        read_checkpoint(checkpoint_path)
        load = L.LightningModule.load_from_checkpoint.__func__  # type: ignore[attr-defined]
        with _building(cls, checkpoint_path):
            return load(cls, checkpoint_path, *args, **kwargs)


def load_from_checkpoint(
    cls: type[ModuleT], ckpt_path: str | Path | IO[bytes], base_weights: str | Path | None = None, **kwargs: Any
) -> ModuleT:
    """Load an adapter checkpoint into a LightningModule class that knows nothing of adapters.

    Args:
        cls: the class that was trained; it is instantiated with the checkpoint's hyperparameters and ``kwargs``, and
            must build its network in ``__init__`` or ``configure_model``, with the weights that the adapter was
            trained on.
        ckpt_path: a ``.ckpt`` with an adapter.
        base_weights: a full checkpoint, state dict or ``.safetensors`` file of the module, if the class does not load
            these weights itself; the same as :class:`~lightning_peft.PEFTCallback`'s.
        kwargs: as for ``LightningModule.load_from_checkpoint``: ``map_location``, and the arguments of ``cls``.

    Returns:
        An instance of ``cls`` with the adapters attached and loaded.

    Raises:
        BaseMismatchError: the base is not the one the adapter was trained on.
        CheckpointError: the file cannot be read, holds no adapter, or does not fit.
    """
    checkpoint = read_adapter_checkpoint(ckpt_path, f": use {cls.__name__}.load_from_checkpoint")
    with _building(cls, ckpt_path):
        module = _without_adapters(cls, checkpoint, kwargs)
    if not any(True for _ in module.parameters()):
        raise CheckpointError(
            f"{cls.__name__} has no network to load the adapter into: Lightning runs no setup() when it loads. Build "
            "it in __init__ or in configure_model()."
        )
    # Before the adapters are attached, whose fingerprint speaks of these weights.
    if base_weights is not None:
        load_base_weights(module, base_weights)
    state: dict[str, Tensor] = checkpoint["state_dict"]
    attach_metadata(module, checkpoint[METADATA_KEY], state)
    module.__class__ = adapted_class(type(module))
    module.load_state_dict(state)
    return module


def _without_adapters(cls: type[ModuleT], checkpoint: dict[str, Any], kwargs: dict[str, Any]) -> ModuleT:
    """The module as Lightning makes it of the checkpoint's hyperparameters; the adapters' tensors are passed over."""
    file = BytesIO()
    torch.save({key: value for key, value in checkpoint.items() if key != METADATA_KEY}, file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are (not )?in the model state dict")
        return cls.load_from_checkpoint(file, **{**kwargs, "strict": False})


@contextmanager
def _building(cls: type, path: object) -> Iterator[None]:
    """Say which file it was when a class cannot be built from the hyperparameters in it."""
    try:
        yield
    except PEFTError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{cls.__name__} cannot be built from the hyperparameters in {path}: {type(error).__name__}: {error} "
            "Arguments that are not in the file can be given beside its path."
        ) from error
