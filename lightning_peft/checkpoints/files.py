"""Reading and writing files: atomically, without pickle, and with a checksum of each."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.checkpoints.checksum import checksum
from lightning_peft.errors import CheckpointError

_SEAL = "sha256"  # the field of a record that holds the checksums
_ITSELF = "record"  # the entry for the record's other fields


def read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        CheckpointError: it is not there, or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): the adapter is incomplete.") from error


def to_json(value: Mapping[str, Any], indent: int | None = 2) -> bytes:
    """``value`` as a text file."""
    return (json.dumps(value, indent=indent, sort_keys=True) + "\n").encode()


def from_json(data: bytes, path: Path) -> dict[str, Any]:
    """The object that ``data``, read from ``path``, holds.

    Raises:
        CheckpointError: it is not JSON, or no object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): it is truncated or damaged.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """``tensors``, none of which shares memory with another one, as a safetensors file."""
    from safetensors.torch import save  # only here: ``import lightning_peft`` stays cheap

    return save({key: tensor.contiguous() for key, tensor in tensors.items()}, {"format": "pt"})


def from_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors that ``data``, read from ``path``, holds.

    Raises:
        CheckpointError: it is no safetensors file, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}): it is truncated or damaged.") from error


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the place of ``path`` at the end of the ``with`` block.

    A process that is killed meanwhile leaves the former file as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name for all writes: the next one overwrites what was left
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def replace_all(folder: Path, contents: Mapping[str, bytes], stale: Iterable[str] = ()) -> None:
    """Write all ``contents`` by file name, and remove those files of ``stale`` that are not among them.

    Everything is on the disk under other names before the first file is replaced; then they are, in their order.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    waiting: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All of it is on the disk before a name changes: a full disk leaves the former files as they were.
        for name, data in contents.items():
            waiting[name] = folder / f".{name}.{uuid.uuid4().hex}"
            with waiting[name].open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            waiting[name].replace(folder / name)
            del waiting[name]
        for name in {*stale} - contents.keys():
            (folder / name).unlink(missing_ok=True)
        _sync(folder)
    except OSError as error:
        raise CheckpointError(f"The adapter cannot be written to {folder}: {error}.") from error
    finally:
        for left in waiting.values():
            left.unlink(missing_ok=True)


def with_checksums(record: Mapping[str, Any], contents: Mapping[str, bytes]) -> dict[str, Any]:
    """``record`` with checksums of itself and of ``contents``, by file name."""
    open_record = {key: value for key, value in record.items() if key != _SEAL}
    sums = {name: _sum(name, data) for name, data in contents.items()}
    return {**open_record, _SEAL: {**sums, _ITSELF: checksum(open_record)}}


def checksummed_files(record: Mapping[str, Any], path: Path) -> list[str]:
    """The files whose checksums a record has.

    Raises:
        CheckpointError: it has none.
    """
    sums = record.get(_SEAL)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise CheckpointError(f"{path} is damaged: it has no checksums ('{_SEAL}').")
    return [name for name in sums if name != _ITSELF]


def changed_files(record: Mapping[str, Any], contents: Mapping[str, bytes]) -> list[str]:
    """The files that are not the ones a record was made with; the record itself is ``""``."""
    sums, now = record[_SEAL], with_checksums(record, contents)[_SEAL]
    return ["" if name == _ITSELF else name for name in {**sums, **now} if sums.get(name) != now.get(name)]


def _sum(name: str, data: bytes) -> str:
    """The checksum of a file; white space and order do not matter in JSON."""
    with suppress(ValueError, RecursionError):
        if name.endswith(".json"):
            return checksum(json.loads(data))
    return hashlib.sha256(data).hexdigest()


def _sync(folder: Path) -> None:
    """Make the new names last; where a folder cannot be opened (Windows), its file system sees to that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
