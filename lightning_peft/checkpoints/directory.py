"""Adapters as directories: in the peft package's own format where it has the method, and checked when they are read.

========================== =============================================================================================
adapter_model.safetensors  the tensors, as peft has them; by our own keys where it has no such method
adapter_config.json        what peft has to know
lightning_peft.json        what we have to know: method, places, base, and a checksum of every file
lightning_peft.safetensors what training goes on from, where peft has only what comes out of it (an MLP's prefix)
========================== =============================================================================================

A directory without ``lightning_peft.json`` is read as one that peft wrote.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.checkpoints import files
from lightning_peft.checkpoints.guard import as_checkpoint_error
from lightning_peft.checkpoints.peft.state import CONFIG
from lightning_peft.core.fields import fits
from lightning_peft.core.method import Method
from lightning_peft.errors import CheckpointError

TENSORS = "adapter_model.safetensors"
MANIFEST = "lightning_peft.json"
TRAINED = "lightning_peft.safetensors"
MANIFEST_VERSION = 1
_FIELDS: dict[str, Any] = {
    "in_transformers_model": bool,
    "in_peft_format": bool,
    "places": list[str],
    "modules_to_save": list[str],
    "base": dict,
}


@dataclass(frozen=True, kw_only=True)
class Directory:
    """An adapter directory as read: checked in itself, and not yet against any model."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    manifest: Mapping[str, Any] | None
    """What ``lightning_peft.json`` says; None for a directory of the peft package."""
    method: Method | None
    """The method of the record."""
    trained: Mapping[str, Tensor] | None
    """The tensors of ``lightning_peft.safetensors``."""
    size: int
    """Bytes of the files together."""


@as_checkpoint_error()
def read_directory(path: str | Path) -> Directory:
    """Read an adapter directory; no pickled code is run.

    Raises:
        CheckpointError: there is none, it is damaged, or it was edited after it had been written.
        ConfigError: the method is unknown, or a field of it has a value it cannot have.
    """
    path = Path(path)
    contents = {name: files.read(path / name) for name in (CONFIG, TENSORS, MANIFEST) if (path / name).is_file()}
    if CONFIG not in contents:
        raise CheckpointError(_no_adapter(path))
    manifest, method = None, None
    record = contents.pop(MANIFEST, None)
    # Checksums first: nothing in a file that was edited is worth an error of its own.
    if record is not None:
        manifest = files.from_json(record, path / MANIFEST)
        _check_version(path, manifest)
        named = files.checksummed_files(manifest, path / MANIFEST)
        unread = [name for name in (TENSORS, TRAINED) if name in named and name not in contents]
        contents |= {name: files.read(path / name) for name in unread}
        _check_seals(path, manifest, contents)
        _check_manifest(path, manifest)
        method = Method.from_config(manifest.get("method"))
    if TENSORS not in contents:
        raise CheckpointError(
            f"{path} has no {TENSORS}, but an adapter_model.bin: a pickle, which is never loaded. Let peft load the "
            "adapter and save it again (save_pretrained)."
            if (path / "adapter_model.bin").exists()
            else f"{path} has no {TENSORS}: the adapter is incomplete."
        )
    config = files.from_json(contents[CONFIG], path / CONFIG)
    tensors = files.from_safetensors(contents[TENSORS], path / TENSORS)
    trained = files.from_safetensors(contents[TRAINED], path / TRAINED) if TRAINED in contents else None
    size = sum(map(len, [record or b"", *contents.values()]))
    return Directory(
        path=path, config=config, tensors=tensors, manifest=manifest, method=method, trained=trained, size=size
    )


def write_directory(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    trained: Mapping[str, Tensor] | None,
) -> None:
    """Write an adapter directory; the arguments are the fields of :class:`Directory`.

    Raises:
        CheckpointError: it cannot be written.
    """
    contents = {CONFIG: files.to_json(config), TENSORS: files.to_safetensors(tensors)}
    if trained is not None:
        contents[TRAINED] = files.to_safetensors(trained)
    manifest = files.with_checksums({"version": MANIFEST_VERSION, **manifest}, contents)
    # The record goes first: until every file is the one that it speaks of, the directory is refused.
    files.replace_all(path, {MANIFEST: files.to_json(manifest, indent=None), **contents}, stale=(TRAINED,))


def _check_version(path: Path, manifest: Mapping[str, Any]) -> None:
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path / MANIFEST} is damaged: its version is {version!r}.")
    if version > MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} was written by a newer lightning_peft (version {version}; this one reads up to "
            f"{MANIFEST_VERSION}). Upgrade lightning_peft."
        )


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    for field, kind in _FIELDS.items():
        if not fits(value := manifest.get(field), kind):
            raise CheckpointError(f"{path / MANIFEST} is damaged: its {field} is {value!r}.")


def _check_seals(path: Path, manifest: Mapping[str, Any], contents: Mapping[str, bytes]) -> None:
    broken = files.changed_files(manifest, contents)
    if not broken:
        return
    # Without the record, edited files that peft could read are still an adapter.
    readable = manifest.get("in_peft_format") is True and "" not in broken
    raise CheckpointError(
        f"{path / (broken[0] or MANIFEST)} is not the file that was written with this adapter: it was edited, is "
        "damaged, or its writing was broken off. "
        + (
            f"If you mean the edit, delete {MANIFEST}: then this is read as a directory of peft."
            if readable
            else "Take the files from where they came from once more."
        )
    )


def _no_adapter(path: Path) -> str:
    """What to say of a path without a config."""
    if not path.is_dir():
        return f"There is no directory {path}{', but a file' if path.exists() else ''}. Give an adapter's directory."
    below = sorted(child.name for child in path.iterdir() if (child / CONFIG).is_file())
    hint = f" There are some below it: {', '.join(map(repr, below))}." if below else ""
    return f"{path} holds no adapter: there is no {CONFIG} in it.{hint}"
