"""The adapters that wait for a module's network, and attaching them when it is there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import lightning as L
from torch import nn

from lightning_peft.checkpoints.ckpt import has_adapters
from lightning_peft.core.method import Method
from lightning_peft.errors import AdapterNameError, CheckpointError
from lightning_peft.injection.inject import inject
from lightning_peft.injection.registry import registry_of
from lightning_peft.training.base_weights import load_base_weights
from lightning_peft.training.checks import GradientWatch, check_still_there
from lightning_peft.training.contents import Content
from lightning_peft.training.continuing import continue_adapter
from lightning_peft.training.trainer import (
    check_comes_back,
    check_trainer,
    file_to_restore,
    make_files_safe,
    renew_copies,
)

FrozenMode = Literal["train", "eval"]
SETUP = "_peft_setup"
"""The attribute of a module that holds its setup."""


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


def setup_of(module: nn.Module) -> AdapterSetup:
    """The setup that waits for ``module``; an empty one is made if there is none."""
    return module.__dict__.setdefault(SETUP, AdapterSetup())


def inject_pending(module: L.LightningModule) -> None:
    """Attach the methods that wait. Attached ones are left as they are, so every stage may call this.

    Where the Trainer is about to restore a checkpoint, they go on waiting: its record and its tensors bring them.

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
    waiting = waiting_methods(module)
    if trainer and waiting:
        check_comes_back(trainer)
        if file_to_restore(trainer):  # on_load_checkpoint attaches them
            return
    for name, method in waiting.items():
        if name in setup.sources:
            continue_adapter(module, setup.sources[name], name, method)
        else:
            inject(module, method, name)  # type: ignore[arg-type]
    if trainer and waiting:
        renew_copies(trainer, module)


def waiting_methods(module: nn.Module) -> dict[str, Method | None]:
    """The methods that are yet to be attached to ``module``, by the adapter's name."""
    setup, registry = module.__dict__.get(SETUP), registry_of(module)  # setup_of would make one
    methods = setup.methods if setup else {}
    return {name: m for name, m in methods.items() if not registry or name not in registry.attachments}


def check_restored(module: L.LightningModule) -> None:
    """Raise if adapters still wait for a file when the Trainer is past loading it.

    Raises:
        CheckpointError: they do.
    """
    if waiting := waiting_methods(module):
        raise CheckpointError(
            f"The Trainer has not loaded {file_to_restore(module.trainer)} into {type(module).__name__}, so the "
            f"adapters {', '.join(map(repr, waiting))} that this checkpoint was to bring are missing. Load it before "
            "(load_from_checkpoint), and leave ckpt_path out."
        )
