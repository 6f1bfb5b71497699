"""Read rows from files or the hub, check them, and divide them: functions with no state.

Whatever is wrong with a file is a :class:`~lightning_peft.errors.DataError` that names the option and the file; an
exception of ``datasets``, pandas or arrow is its cause. ``datasets`` is imported when the first function needs it.
"""

import glob
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

# pandas would otherwise read the texts and labels "NA", "null" and "None" as missing. An empty field is missing.
_CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", _CSV | {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
# What data sets on the hub call their validation split.
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Source:
    """Rows, and where they came from in the words of an error message; with ``lines``, row 0 is line 1 of a file."""

    rows: "Dataset"
    origin: str
    lines: bool = False


def looks_local(path: str) -> bool:
    """True if ``path`` can only be meant as a path, since no name on the hub looks like that."""
    return (
        path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or Path(path).suffix.lower() in READERS
    )


def require_path(path: str, option: str) -> Path:
    """Return ``path`` with ``~`` expanded; it must exist.

    Raises:
        DataError: If nothing is there. Names the working directory and files of nearly that name.
    """
    expanded = Path(path).expanduser()
    if not expanded.exists():
        beside = (file.name for file in expanded.parent.iterdir()) if expanded.parent.is_dir() else ()
        raise DataError(
            f"{option}: {path!r} does not exist (working directory: {Path.cwd()}).{did_you_mean(expanded.name, beside)}"
        )
    return expanded


def read_file(file: str, option: str) -> Source:
    """Read one csv, tsv, json, jsonl or parquet file.

    Args:
        file: Its path.
        option: The option that named it, for messages.

    Raises:
        DataError: If it is missing, of another kind, malformed, or has no rows.
    """
    reader, options = READERS[require_file(file, option).suffix.lower()]
    return load_file(file, option, reader, **options)


def require_file(file: str, option: str, kinds: Collection[str] = READERS.keys()) -> Path:
    """Return the path of a file, which must be there and of a known kind.

    Raises:
        DataError: If it is missing, a folder, or its name ends in none of ``kinds``.
    """
    path = require_path(file, option)
    if not path.is_file():
        raise DataError(f"{option}: {file!r} is a folder; it must be one file.")
    if path.suffix.lower() not in kinds:
        raise DataError(f"{option}: {file!r} is of no known kind; its name must end in one of {', '.join(kinds)}.")
    return path


def load_file(file: str, option: str, reader: str, **options: Any) -> Source:
    """Read one file with a reader of ``datasets``.

    Raises:
        DataError: If it is malformed, or has no rows.
    """
    from datasets import load_dataset

    try:
        # `datasets` takes the name for a glob pattern.
        rows = load_dataset(reader, data_files=glob.escape(str(Path(file).expanduser())), split="train", **options)
    except Exception as error:
        raise DataError(f"{option}: {file!r} holds no rows or cannot be read as {reader}: {_reason(error)}") from error
    return _require_rows(Source(rows, f"{option} {file!r}"))


def read_path(path: str, name: str | None = None, read: Callable[[str, str], Source] = read_file) -> dict[str, Source]:
    """Read a data file (all of it becomes ``train``), a local folder, or a data set of the hub, by split.

    Args:
        path: File, folder or hub name.
        name: Configuration of a hub data set.
        read: What reads a file, given its path and the option that named it.

    Returns:
        Rows by split: ``train``, and ``validation`` and ``test`` if they are there.

    Raises:
        DataError: If it cannot be read or has no ``train`` split.
        ConfigError: If ``name`` is given for a file.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    folder = Path(path).expanduser()
    if folder.is_file() or (looks_local(path) and not folder.is_dir()):
        if name is not None:
            raise ConfigError(f"name={name!r} chooses a configuration of a hub data set, but path={path!r} is a file.")
        return {"train": read(path, "path")}
    try:
        if any((folder / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            # What save_to_disk wrote: load_dataset refuses it.
            found = load_from_disk(str(folder))
        else:
            found = load_dataset(str(folder) if folder.is_dir() else path, name)
    except Exception as error:
        raise DataError(f"path: cannot load {path!r} (name={name!r}): {_reason(error)}") from error
    splits = {"train": found} if isinstance(found, Dataset) else dict(found)
    if "train" not in splits:
        raise DataError(f"path: {path!r} has no 'train' split. Its splits: {_listed(splits)}.")
    wanted = {"train": "train", "test": "test"} | {key: "validation" for key in _VALIDATION_NAMES if key in splits}
    return {
        split: _require_rows(Source(splits[key], f"split {key!r} of {path!r}"))
        for key, split in wanted.items()
        if key in splits
    }


def require_columns(source: Source, columns: Mapping[str, str | None]) -> None:
    """Check that columns are there.

    Args:
        source: The rows.
        columns: Column by the option that names it; None is skipped.

    Raises:
        DataError: For the first that is missing. Lists those there.
    """
    there = source.rows.column_names
    for option, column in columns.items():
        if column is not None and column not in there:
            raise DataError(
                f"{source.origin} has no column {column!r} ({option}). "
                f"Its columns: {_listed(there)}.{did_you_mean(column, there)}"
            )


def require_text(source: Source, column: str, option: str) -> None:
    """Check that every row of ``column`` has a text.

    Raises:
        DataError: If the column is of another type, or a text is missing or blank.
    """
    dtype = getattr(source.rows.features[column], "dtype", type(source.rows.features[column]).__name__)
    texts = source.rows.with_format("arrow")[column][:]
    if texts.null_count == len(texts):  # its type is then a guess of the reader
        raise DataError(f"{source.origin}: column {column!r} ({option}) is empty in all {len(source.rows)} rows.")
    if dtype not in ("string", "large_string"):
        raise DataError(
            f"{source.origin}: column {column!r} ({option}) is of type {dtype}, not text. "
            f"Name the column that holds the text. Its columns: {_listed(source.rows.column_names)}."
        )
    # Arrow for speed: a pass over a million rows in Python takes seconds.
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True)
    if (count := pc.sum(blank).as_py() or 0) > 0:
        rows = [index for index, is_blank in enumerate(blank.to_pylist()) if is_blank]
        raise DataError(
            f"{source.origin}: column {column!r} ({option}) has {count} empty texts of {len(source.rows)}: "
            f"{first_rows(rows)}. Fill or remove these rows."
        )


def divide(rows: int, validation: int | float, test: int | float, seed: int, origin: str) -> dict[str, list[int]]:
    """Divide row numbers at random into ``train``, ``validation`` and ``test``.

    Args:
        rows: How many there are.
        validation: How many to set aside: rows if an int, a share of all if a float (at least one row), 0 for none.
        test: The same for ``test``.
        seed: All the division depends on, besides the numbers above; the same in every version of every library.
        origin: Where the rows came from, for the message.

    Returns:
        Ascending row numbers by split; a split that gets none is left out.

    Raises:
        DataError: If no rows would be left for training.
    """
    counts = {
        split: max(1, round(rows * size)) if isinstance(size, float) and size > 0 else int(size)
        for split, size in (("validation", validation), ("test", test))
    }
    train = rows - sum(counts.values())
    if train < 1:
        raise DataError(
            f"{origin} has {rows} rows; validation_split={validation!r} and test_split={test!r} take "
            f"{sum(counts.values())} of them and leave none for training. Make them smaller."
        )
    # Python promises that random() gives the same numbers for a seed for ever; of shuffle() it does not promise that.
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(rows)]
    shuffled = iter(sorted(range(rows), key=keys.__getitem__))
    parts = {split: sorted(islice(shuffled, count)) for split, count in (counts | {"train": train}).items()}
    return {split: part for split, part in parts.items() if part}


def first_rows(rows: list[int]) -> str:
    """Name the first few rows: ``"rows 3, 7, 12 and 5 more (counted from 0)"``."""
    return f"{first_few('row', rows)} (counted from 0)"


def first_few(unit: str, numbers: list[int]) -> str:
    """Name the first few of what has ``numbers``: ``"lines 3, 7, 12 and 5 more"``."""
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"{unit}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:3]))}{more}"


def _require_rows(source: Source) -> Source:
    if not len(source.rows):
        raise DataError(f"{source.origin} has no rows.")
    return source


def _reason(error: Exception) -> str:
    # `datasets` says only "An error occurred"; what occurred is the cause.
    inner = error.__cause__ or error
    return " ".join(f"{type(inner).__name__}: {inner}".split())


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
