"""The command's own subcommands, beside LightningCLI's: work on files that needs no training."""

from pathlib import Path
from typing import Any

import lightning as L
import rich
from rich.table import Table

from lightning_peft.checkpoints.ckpt import METADATA_KEY, methods_in
from lightning_peft.checkpoints.inspection import inspect_adapter
from lightning_peft.checkpoints.save_load import load_adapter, save_adapter
from lightning_peft.errors import ConfigError
from lightning_peft.injection.registry import registries
from lightning_peft.merging.merge import merge
from lightning_peft.network.pretrained import pretrained_models
from lightning_peft.training.adaptation import adapted_class
from lightning_peft.training.files import read_adapter_checkpoint
from lightning_peft.training.trainer import make_files_safe

Data = L.LightningDataModule | None


class CommandTrainer(L.Trainer):
    """A Trainer with the subcommands as methods, which is where LightningCLI looks for them."""

    def export(
        self, model: L.LightningModule, ckpt_path: str, output: str, name: str = "default", datamodule: Data = None
    ) -> None:
        """Write the adapter of a checkpoint as a directory, for peft where it has the method.

        Args:
            model: the module that the checkpoint belongs to.
            ckpt_path: a ``.ckpt`` with an adapter.
            output: the directory to write.
            name: the adapter's name.
            datamodule: not needed.
        """
        _load(model, ckpt_path)
        save_adapter(model, output, name)
        rich.print(inspect_adapter(output))

    def take(
        self, model: L.LightningModule, path: str, output: str, name: str = "default", datamodule: Data = None
    ) -> None:
        """Write a ``.ckpt`` out of an adapter directory, the peft package's too.

        Args:
            model: the module that the adapter fits.
            path: the adapter directory.
            output: the ``.ckpt`` to write; there is no training to resume in it.
            name: what to call the adapter.
            datamodule: not needed.
        """
        model.__class__ = adapted_class(type(model))
        rich.print(load_adapter(model, path, name))
        self._write(model, output)

    def merge(
        self,
        model: L.LightningModule,
        ckpt_path: str,
        output: str,
        dequantize: bool = False,
        datamodule: Data = None,
    ) -> None:
        """Write the model with the adapters of a checkpoint folded in: a plain model, with no trace of adapters.

        Args:
            model: the module that the checkpoint belongs to.
            ckpt_path: a ``.ckpt`` with an adapter.
            output: a directory for the transformers model (``save_pretrained``), or a ``.ckpt`` for the module.
            dequantize: True to make the layers of a quantized model plain, which merging into them takes.
            datamodule: not needed.
        """
        # Asked before the checkpoint is read and merged, which takes minutes for a large model.
        networks = [network for _, network in pretrained_models(model)]
        if not output.endswith(".ckpt") and len(networks) != 1:
            raise ConfigError(
                f"--output={output}: {type(model).__name__} does not hold exactly one transformers model to write as a "
                "directory. Name a file that ends in .ckpt for a checkpoint of the whole module."
            )
        _load(model, ckpt_path)
        # Lists: merging takes the adapters out of what is iterated.
        for _, owner, registry in list(registries(model)):
            for name in list(registry.attachments):
                rich.print(merge(owner, name, dequantize=dequantize))
        if output.endswith(".ckpt"):
            self._write(model, output)
        else:
            network: Any = networks[0]
            network.save_pretrained(output)
            _save_tokenizer(network.name_or_path, output)
            print(f"{output}: {type(network).__name__}, {sum(p.numel() for p in network.parameters()):,} parameters")

    def inspect(self, model: L.LightningModule, path: str, datamodule: Data = None) -> None:
        """Show what an adapter directory holds, and whether it fits the model.

        Args:
            model: any module.
            path: an adapter directory. To see it, or a ``.ckpt``, without a model: lightning-peft inspect PATH.
            datamodule: not needed.
        """
        rich.print(inspect_adapter(path, model))

    def _write(self, model: L.LightningModule, output: str) -> None:
        self.strategy.connect(model)
        make_files_safe(self)
        self.save_checkpoint(output, weights_only=True)
        print(f"{output}: {Path(output).stat().st_size:,} bytes")


# The names of the subcommands. "import" is a keyword, so the method has another name.
setattr(CommandTrainer, "import", CommandTrainer.take)
COMMANDS = ("export", "import", "merge", "inspect")


def show_file(path: str) -> None:
    """Show what an adapter directory or a ``.ckpt`` holds.

    Raises:
        CheckpointError: it holds no adapter, or cannot be read.
    """
    if Path(path).is_dir():
        rich.print(inspect_adapter(path))
        return
    checkpoint = read_adapter_checkpoint(path)
    table = Table(title=path, title_justify="left", title_style="bold", show_header=False)
    for (place, name), method in methods_in(checkpoint[METADATA_KEY]).items():
        # Most fields of a method are off (None, False, 0): only what acts is shown.
        told = {key: value for key, value in method.to_config().items() if value not in (None, False, [], {})}
        fields = ", ".join(f"{key}={value!r}" for key, value in told.items() if key != "method")
        table.add_row(f"Adapter '{name}'" + (f" on '{place}'" if place else ""), f"{told['method']}: {fields}")
    numbers = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    table.add_row("Tensors", f"{len(checkpoint['state_dict'])} ({numbers:,} numbers)")
    table.add_row("File", f"{Path(path).stat().st_size:,} bytes")
    table.add_row("Trained", f"{checkpoint.get('epoch')} epochs, {checkpoint.get('global_step')} steps")
    rich.print(table)


def _load(model: L.LightningModule, ckpt_path: str) -> None:
    """Attach and load the adapters of a checkpoint."""
    checkpoint = read_adapter_checkpoint(ckpt_path)
    model.__class__ = adapted_class(type(model))
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])


def _save_tokenizer(source: str, output: str) -> None:
    """Put the tokenizer that lies beside the pretrained model beside the merged one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):  # it has none: no text model, or one built from a config
        return
    tokenizer.save_pretrained(output)
