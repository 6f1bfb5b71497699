"""Reading and writing ``.ckpt`` files: a bad one is this library's error, and a killed process leaves no half one."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import fsspec
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from packaging.version import InvalidVersion, Version
from torch import Tensor
from typing_extensions import override

from lightning_peft.checkpoints.checksum import checksum
from lightning_peft.checkpoints.ckpt import METADATA_KEY
from lightning_peft.checkpoints.files import replaced_whole
from lightning_peft.checkpoints.guard import check_bounds
from lightning_peft.errors import CheckpointError

_CHECKSUM = "checksum"
_VERSION = "pytorch-lightning_version"


def _is_named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


_PARTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": (lambda value: type(value) is int, "a whole number"),
    "global_step": (lambda value: type(value) is int, "a whole number"),
    "hyper_parameters": (_is_named, "a mapping from names to values"),
    "loops": (_is_named, "a mapping from names to values"),
    "callbacks": (_is_named, "a mapping from names to values"),
    "optimizer_states": (_is_list, "a list of mappings"),
    "lr_schedulers": (_is_list, "a list of mappings"),
}
"""What Lightning itself writes into a checkpoint."""


def read_checkpoint(path: str | Path | IO[bytes]) -> dict[str, Any]:
    """Read a ``.ckpt`` to the CPU; no pickled code is run.

    Raises:
        CheckpointError: there is no such file, it is damaged, or no Lightning checkpoint.
    """
    opened = fsspec.open(str(path), "rb") if isinstance(path, (str, Path)) else nullcontext(path)
    try:
        with opened as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            file.seek(0)  # Lightning reads a caller's open file once more
    except Exception as error:
        raise _unreadable(path, error) from error
    return _checked(path, checkpoint)


def read_adapter_checkpoint(path: str | Path | IO[bytes], remedy: str = "") -> dict[str, Any]:
    """Read a ``.ckpt`` that must hold an adapter, as :func:`read_checkpoint` does.

    Args:
        path: its path, or an open file.
        remedy: what to do with a full checkpoint, for the message.

    Raises:
        CheckpointError: it holds no adapter, or cannot be read.
    """
    checkpoint = read_checkpoint(path)
    if METADATA_KEY not in checkpoint:
        raise CheckpointError(f"{path} holds no adapter; it looks like a full checkpoint{remedy}.")
    return checkpoint


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file, of a Lightning checkpoint, or of a saved state dict.

    Raises:
        CheckpointError: there is no such file, it is damaged, or holds no tensors by name.
    """
    from safetensors.torch import load_file

    try:
        # Not read_checkpoint: what torch.save made of a state dict is no Lightning checkpoint.
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error
    weights = weights.get("state_dict", weights) if isinstance(weights, Mapping) else weights
    if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{path} holds no weights: neither a checkpoint with a 'state_dict' nor tensors by name.")
    return dict(weights)


class SafeCheckpointIO(CheckpointIO):
    """Reads and writes as ``inner`` does, but a file is there whole or not at all.

    What cannot be read, or was changed after it was written, is a :class:`CheckpointError`.
    """

    def __init__(self, inner: CheckpointIO) -> None:
        self.inner = inner

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **kwargs: Any) -> None:
        if METADATA_KEY in checkpoint:
            checkpoint = {**checkpoint, METADATA_KEY: {**checkpoint[METADATA_KEY], _CHECKSUM: checksum(checkpoint)}}
        if type(self.inner) is TorchCheckpointIO and "://" not in str(path):
            with replaced_whole(Path(path)) as temporary:
                self.inner.save_checkpoint(checkpoint, temporary, *args, **kwargs)
        else:
            self.inner.save_checkpoint(checkpoint, path, *args, **kwargs)

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Lightning's own default runs pickled code where the file is a remote one.
        kwargs["weights_only"] = True if kwargs.get("weights_only") is None else kwargs["weights_only"]
        try:
            checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        except Exception as error:
            raise _unreadable(path, error) from error
        return _checked(path, checkpoint)

    @override
    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.inner.remove_checkpoint(*args, **kwargs)

    @override
    def teardown(self) -> None:
        self.inner.teardown()


def _unreadable(path: object, error: Exception) -> CheckpointError:
    # torch.load has no error of its own: zip, pickle, struct and key errors all mean the same.
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"There is no checkpoint {path}.")
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
    return CheckpointError(
        f"{path} cannot be read; it is truncated, damaged, or holds more than tensors and plain values ({reason})."
    )


def _checked(path: object, checkpoint: Any) -> dict[str, Any]:
    """Check what can be told without a model: the sum, and that each of Lightning's own parts is of its kind."""
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no Lightning checkpoint: it has no 'state_dict'.")
    try:
        check_bounds(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    try:
        _check_sum(path, checkpoint)
    except CheckpointError:
        raise
    except Exception as error:  # of a tensor whose elements cannot be read
        raise _unreadable(path, error) from error
    state = checkpoint["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path}: the 'state_dict' of this file is damaged: it maps no names to tensors.")
    for key, (good, kind) in _PARTS.items():
        if key in checkpoint and not good(checkpoint[key]):
            raise CheckpointError(f"{path}: {key!r} of this file is damaged: it must be {kind}.")
    _check_version(path, checkpoint)
    return checkpoint


def _check_sum(path: object, checkpoint: dict[str, Any]) -> None:
    record = checkpoint.get(METADATA_KEY)
    if isinstance(record, dict) and _CHECKSUM in record:
        written = {**checkpoint, METADATA_KEY: {key: value for key, value in record.items() if key != _CHECKSUM}}
        if checksum(written) != record[_CHECKSUM]:
            raise CheckpointError(
                f"{path} is not what was written: its checksum differs, so it was damaged or edited. Use another copy; "
                f"to accept an edit of your own, delete checkpoint['{METADATA_KEY}']['{_CHECKSUM}'] and save it again."
            )


def _check_version(path: object, checkpoint: dict[str, Any]) -> None:
    # Lightning brings files of older versions up to date first thing, wherever in them that leads.
    version: Any = checkpoint.get(_VERSION)
    try:
        old = Version(version) < Version("2.0") and METADATA_KEY in checkpoint
    except (InvalidVersion, TypeError):
        raise CheckpointError(f"{path}: {_VERSION!r} of this file is damaged: {version!r} is no version.") from None
    if old:
        raise CheckpointError(f"{path}: {_VERSION!r} of this file is damaged: there were no adapters in {version}.")
