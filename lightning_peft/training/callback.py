"""``PEFTCallback``: the one line that turns a LightningModule's training into parameter-efficient fine-tuning."""

from collections.abc import Iterator

import lightning as L
import rich
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.core.method import Method
from lightning_peft.core.registry import registries
from lightning_peft.core.report import report
from lightning_peft.errors import ConfigError, GradientError, OptimizerError
from lightning_peft.training.adaptation import adapt
from lightning_peft.training.files import CheckedCheckpointIO


class PEFTCallback(L.Callback):
    """Freezes the module, injects ``method``, and keeps the base out of every checkpoint.

    The module's class, its steps and its ``configure_optimizers`` stay as they are. Adapters are attached when the
    network is complete, wherever it is built (``__init__``, ``setup``, ``configure_model``), and before a checkpoint is
    loaded.

    Args:
        method: what to inject, such as ``LoRA(r=8)``. None trains the whole model, for comparison.
        name: the adapter's name. Several callbacks with different names train several adapters together.
        show: print a table of what is injected, trained and frozen before training starts.

    Raises:
        OptimizerError: at the start of ``fit``, when a parameter that should train is in no optimizer.
        GradientError: after the first backward, when an adapter got no gradient.
    """

    def __init__(self, method: Method | None, name: str = "default", show: bool = True) -> None:
        if method is not None and not isinstance(method, Method):
            raise ConfigError(f"PEFTCallback needs a method such as LoRA(r=8), or None, not {method!r}.")
        self.method, self.name, self.show = method, name, show
        self._without_gradient: dict[str, Tensor] | None = None

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[{self.name}]"

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if [callback.name for callback in _peft_callbacks(trainer)].count(self.name) > 1:
            raise ConfigError(
                f"There are two PEFTCallbacks with the name {self.name!r}: give one another, name='second'."
            )
        if self.method is not None:
            adapt(pl_module, self.name, self.method)
            if not isinstance(trainer.strategy.checkpoint_io, CheckedCheckpointIO):
                trainer.strategy.checkpoint_io = CheckedCheckpointIO(trainer.strategy.checkpoint_io)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.method is None:
            return
        _check_optimizers(trainer, pl_module)
        self._without_gradient = dict(_trained(pl_module, self.name))
        if self.show and next(_peft_callbacks(trainer)) is self:  # one table holds the adapters of all callbacks
            rank_zero_only(rich.print)(report(pl_module))

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._without_gradient is None:
            return
        self._without_gradient = {n: p for n, p in self._without_gradient.items() if p.grad is None}
        if pl_module.automatic_optimization:
            self._check_gradients()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        # In manual optimization one step may run several backwards, each for another network: all of them count.
        if self._without_gradient is not None:
            self._check_gradients()

    def _check_gradients(self) -> None:
        missing, self._without_gradient = self._without_gradient, None
        if missing:
            hosts = list(dict.fromkeys(f".{name}".rpartition(".peft.")[0].lstrip(".") for name in missing))
            raise GradientError(
                f"The adapter {self.name!r} got no gradient in the first backward at {len(hosts)} of its layers, first "
                f"'{hosts[0]}': the loss does not depend on that layer's output. Leave it out "
                f"(exclude_modules=[{hosts[0]!r}]), or see whether the module runs it, detaches "
                "it, or runs it under no_grad."
            )


def _peft_callbacks(trainer: L.Trainer) -> Iterator[PEFTCallback]:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return (callback for callback in callbacks if isinstance(callback, PEFTCallback))


def _trained(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of adapter ``name`` that train, by their path from ``module``."""
    for prefix, _, registry in registries(module):
        for path, adapter in registry.adapters(name):
            for key, parameter in adapter.named_parameters():
                if parameter.requires_grad:
                    yield ".".join(part for part in (prefix, path, "peft", key) if part), parameter


def _check_optimizers(trainer: L.Trainer, module: nn.Module) -> None:
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if missing := [name for name, parameter in named.items() if id(parameter) not in held]:
        raise OptimizerError(
            f"{len(missing)} of {len(named)} parameters that should train are in no optimizer, first '{missing[0]}'. "
            "Give configure_optimizers all that trains: "
            "torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=...)."
        )
