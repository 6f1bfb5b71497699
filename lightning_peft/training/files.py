"""Reading ``.ckpt`` files so that a bad one is this library's error, by hand and under a Trainer."""

from pathlib import Path
from typing import IO, Any

import fsspec
import torch
from lightning.fabric.plugins import CheckpointIO
from typing_extensions import override

from lightning_peft.errors import CheckpointError


def read_checkpoint(path: str | Path | IO[bytes]) -> dict[str, Any]:
    """Read a ``.ckpt`` to the CPU; no pickled code is run.

    Raises:
        CheckpointError: there is no such file, it is truncated or damaged, or no Lightning checkpoint.
    """
    try:
        if isinstance(path, (str, Path)):
            with fsspec.open(str(path), "rb") as file:
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            path.seek(0)
    except Exception as error:
        raise _unreadable(path, error) from error
    return _checked(path, checkpoint)


class CheckedCheckpointIO(CheckpointIO):
    """Reads and writes as ``inner`` does; what cannot be read is a :class:`CheckpointError`."""

    def __init__(self, inner: CheckpointIO) -> None:
        self.inner = inner

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.inner.save_checkpoint(*args, **kwargs)

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
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
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no Lightning checkpoint: it has no 'state_dict'.")
    return checkpoint
