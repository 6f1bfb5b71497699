"""Starting weights of the base, from a file."""

from pathlib import Path

from torch import nn

from lightning_peft.errors import CheckpointError, did_you_mean
from lightning_peft.injection.names import owner_of
from lightning_peft.network.walk import plain_name
from lightning_peft.training.files import read_weights


def load_base_weights(module: nn.Module, path: str | Path) -> None:
    """Load all of ``module`` from a full checkpoint, a saved state dict or a ``.safetensors`` file.

    Raises:
        CheckpointError: the file cannot be read, or does not hold exactly the tensors of ``module``.
    """
    weights = {plain_name(key): tensor for key, tensor in read_weights(path).items()}
    names = {plain_name(key): key for key in module.state_dict(keep_vars=True)}
    shapes = {plain_name(key): tensor.shape for key, tensor in module.state_dict(keep_vars=True).items()}
    where = f"base_weights={str(path)!r}"
    if missing := [name for name in shapes if name not in weights]:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(shapes)} tensors of {type(module).__name__}, first '{missing[0]}'."
            f"{did_you_mean(missing[0], weights)} Give the weights of the whole module, under its own names."
        )
    if extra := [name for name in weights if name not in shapes]:
        adapter = " It is a file of an adapter: give that as ckpt_path." if owner_of(extra[0]) else ""
        raise CheckpointError(
            f"{where} holds {len(extra)} tensors that {type(module).__name__} does not have, first '{extra[0]}'."
            f"{did_you_mean(extra[0], shapes)}{adapter}"
        )
    # Checked whole before a value is loaded.
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise CheckpointError(
                f"{where}: '{name}' has shape {list(weights[name].shape)} in the file and {list(shape)} in "
                f"{type(module).__name__}."
            )
    module.load_state_dict({names[name]: tensor for name, tensor in weights.items()})
