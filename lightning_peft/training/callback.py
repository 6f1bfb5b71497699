"""``PEFTCallback``: the one line that turns a LightningModule's training into parameter-efficient fine-tuning."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import lightning as L
import rich
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_peft.core.method import Method
from lightning_peft.errors import ConfigError
from lightning_peft.injection.report import report
from lightning_peft.training.adaptation import prepare_module
from lightning_peft.training.contents import Content
from lightning_peft.training.pending import FrozenMode
from lightning_peft.training.trainer import check_trainer


class PEFTCallback(L.Callback):
    """Freezes the module, injects ``method``, and keeps the base out of every checkpoint.

    The module's class, its steps and its ``configure_optimizers`` stay as they are. Adapters are attached when the
    network is complete, wherever it is built (``__init__``, ``setup``, ``configure_model``), and before a checkpoint is
    loaded. Where it stands among the Trainer's callbacks makes no difference.

    Args:
        method: what to inject, such as ``LoRA(r=8)``. None, with no ``init_from``, trains the whole model.
        name: the adapter's name. Several callbacks with different names train several adapters together.
        show: True to print the report (injected, trained and frozen parts) before training starts.
        checkpoint: what a ``.ckpt`` holds: ``"adapter"`` alone; ``"merged"``, a full checkpoint with the original keys,
            for use without this library (training cannot be resumed from it); or ``"full"``, base and adapter.
        frozen_mode: the mode of the frozen base while training: ``"train"`` leaves its dropout as the module has it,
            ``"eval"`` turns it off. Normalization layers with running statistics are in eval in both.
        base_weights: a full checkpoint, state dict or ``.safetensors`` file of the module, loaded before injection.
        init_from: an adapter directory, or a ``.ckpt`` with an adapter, to go on from on a new task. Leave ``method``
            None to take the one it was trained with; another one is an error. It is not read where the Trainer restores
            a checkpoint, which holds what became of it.

    Raises:
        ConfigError: an option has a value it cannot have, or differs between callbacks of one Trainer.
        NotApplicableError: at ``setup``, when the Trainer's strategy shards parameters.
        OptimizerError: at the start of ``fit``, when a parameter that should train is in no optimizer.
        GradientError: after the first backward, when an adapter got no gradient.
    """

    def __init__(
        self,
        method: Method | None,
        name: str = "default",
        show: bool = True,
        checkpoint: Content = "adapter",
        frozen_mode: FrozenMode = "train",
        base_weights: str | Path | None = None,
        init_from: str | Path | None = None,
    ) -> None:
        if method is not None and not isinstance(method, Method):
            raise ConfigError(f"PEFTCallback needs a method such as LoRA(r=8), or None, not {method!r}.")
        for option, value, choices in (
            ("checkpoint", checkpoint, get_args(Content)),
            ("frozen_mode", frozen_mode, get_args(FrozenMode)),
        ):
            if value not in choices:
                raise ConfigError(f"PEFTCallback: {option}={value!r} must be one of {', '.join(map(repr, choices))}.")
        self.method, self.name, self.show, self.init_from = method, name, show, init_from
        self.options = {"checkpoint": checkpoint, "frozen_mode": frozen_mode, "base_weights": base_weights}

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[{self.name}]"

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self._adapts:
            return
        # Now, before setup() or configure_model() build the network; it is asked again when adapters are attached.
        check_trainer(trainer)
        for other in _peft_callbacks(trainer):
            if other is not self and other.name == self.name:
                raise ConfigError(
                    f"There are two PEFTCallbacks with the name {self.name!r}: give one another, name='second'."
                )
            if other._adapts and other.options != self.options:
                raise ConfigError(
                    f"The PEFTCallbacks {self.name!r} and {other.name!r} train one module and must agree, and say "
                    f"{self.options} and {other.options}."
                )
        prepare_module(pl_module, self.name, self.method, self.init_from, **self.options)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # One table holds the adapters of all callbacks.
        if self._adapts and self.show and next(_peft_callbacks(trainer)) is self:
            rank_zero_only(rich.print)(report(pl_module))

    @property
    def _adapts(self) -> bool:
        return self.method is not None or self.init_from is not None


def _peft_callbacks(trainer: L.Trainer) -> Iterator[PEFTCallback]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return (callback for callback in callbacks if isinstance(callback, PEFTCallback))
