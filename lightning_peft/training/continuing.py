"""Going on from an adapter that was trained before, on another task."""

from pathlib import Path

from torch import nn

from lightning_peft.checkpoints.ckpt import METADATA_KEY, prepare_metadata
from lightning_peft.checkpoints.directory import read_directory
from lightning_peft.checkpoints.save_load import prepare
from lightning_peft.core.method import Method
from lightning_peft.errors import ConfigError
from lightning_peft.injection.inject import attach
from lightning_peft.training.files import read_adapter_checkpoint


def continue_adapter(module: nn.Module, path: str | Path, name: str, method: Method | None = None) -> None:
    """Attach the adapter that lies at ``path`` to ``module`` as ``name``, with its values.

    Args:
        module: the network, without an adapter of that name.
        path: an adapter directory, or a ``.ckpt`` with an adapter of that name or with one adapter.
        name: what to call it here.
        method: what it has to be; None for whatever it is.

    Raises:
        ConfigError: it was trained with another method.
        PEFTError: it cannot be read, or does not fit.
    """
    if Path(path).is_dir():
        injection = prepare(module, read_directory(path), name)
    else:
        checkpoint = read_adapter_checkpoint(path, ": see base_weights")
        injection = prepare_metadata(module, checkpoint[METADATA_KEY], checkpoint["state_dict"], name)
    # Before anything is attached: after an error the module is as it was.
    if method is not None and injection.method.to_config() != method.to_config():
        raise ConfigError(
            f"init_from={str(path)!r} is an adapter of {injection.method}, and PEFTCallback asks for {method}. Leave "
            "the method out (None) to take the file's."
        )
    attach(module, injection)
