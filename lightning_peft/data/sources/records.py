"""Rows that may each be bad: read one by one, so that one bad row costs that row and its line number is known."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_peft.data.sources.loading import READERS, Source, first_few, load_file, read_file, require_file
from lightning_peft.errors import DataError

# The only column of rows that are still JSON. Arrow would refuse a whole file for one row of another type.
_JSON = "one row of JSON"


class BadRowError(DataError):
    """A row cannot be used.

    Args:
        reason: In words that many rows share: they are counted by it.
        detail: What it is in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def read_records(file: str, option: str) -> Source:
    """Read a file, leaving json and jsonl to :func:`parse`; txt is one row.

    Args:
        file: Its path.
        option: The option that named it, for messages.

    Raises:
        DataError: If it is missing, of another kind, or has no rows.
    """
    path = require_file(file, option, (*READERS, ".txt"))
    kind = path.suffix.lower()
    if kind == ".txt":
        return load_file(file, option, "text", sample_by="document")
    # A .json file is one array or, as `datasets` has it too, one object a line.
    if kind == ".json" and (listed := _read_list(path, file, option)) is not None:
        from datasets import Dataset

        return Source(Dataset.from_dict({_JSON: [json.dumps(row) for row in listed]}), f"{option} {file!r}")
    if kind in (".json", ".jsonl"):
        source = load_file(file, option, "text")
        return Source(source.rows.rename_column("text", _JSON), source.origin, lines=True)
    return read_file(file, option)


def parse(rows: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Yield the number of each row, with the row as a dict or the :class:`BadRowError` that it is.

    Blank lines are no rows.

    Args:
        rows: A batch of rows by column.
        numbers: Their numbers.
    """
    if _JSON not in rows:
        for position, number in enumerate(numbers):
            yield number, {column: values[position] for column, values in rows.items()}
        return
    for number, line in zip(numbers, rows[_JSON], strict=True):
        # Some editors begin a file with a byte order mark, which is no JSON.
        text = line.removeprefix("\ufeff").strip()
        if not text:
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            yield number, BadRowError("not JSON", str(error))
        else:
            yield number, row if isinstance(row, dict) else BadRowError("not JSON", f"{_kind(row)}, not an object")


def has_columns(source: Source) -> bool:
    """True if all rows have the same columns, which rows of JSON need not have."""
    return source.rows.column_names != [_JSON]


def require_text(value: Any, column: str, missing: str) -> str:
    """Return ``value``, which must be a text that is not blank.

    Raises:
        BadRowError: If it is none; ``missing`` is the reason if there is nothing.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRowError(missing, f"{column!r} is empty")
    if not isinstance(value, str):
        raise BadRowError("not text", f"{column!r} is {_kind(value)}")
    return value


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """What became of the rows of one file or split.

    Attributes:
        origin: Where they came from.
        lines: True if numbers are lines of a file, counted from 1, and not rows, counted from 0.
        rows: How many there are.
        bad: Numbers of the rows that are left out, by reason.
        examples: The first bad row's own message, by reason.
        cut: Numbers of the rows that are cut to max_length.
    """

    origin: str
    lines: bool
    rows: int
    bad: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)

    @property
    def used(self) -> int:
        """How many rows are used."""
        return self.rows - sum(map(len, self.bad.values()))

    def describe(self, max_length: int) -> str:
        """Return sentences for a person; empty if there is nothing to say."""
        parts = []
        if self.bad:
            parts.append(self._bad())
        if self.cut:
            where = self._where(self.cut)
            parts.append(f"{len(self.cut)} rows are cut at their end to max_length={max_length} tokens ({where}).")
        return f"{self.origin}: {' '.join(parts)}" if parts else ""

    def require_good(self, all_good: bool) -> None:
        """Check that there is a row to use, or that all rows can be used.

        Raises:
            DataError: If not.
        """
        if not self.rows:
            raise DataError(f"{self.origin} has no rows.")
        if self.bad and (all_good or not self.used):
            remedy = "Correct or remove them" + (", or set on_bad_row='skip'." if self.used else ".")
            raise DataError(f"{self.origin}: {self._bad()} {remedy}")

    def _bad(self) -> str:
        ordered = sorted(self.bad.items(), key=lambda item: -len(item[1]))
        reasons = (f"{len(rows)} {self.examples[reason]} ({self._where(rows)})" for reason, rows in ordered)
        return f"{self.rows - self.used} of {self.rows} rows cannot be used: {'; '.join(reasons)}."

    def _where(self, numbers: list[int]) -> str:
        return first_few("line", numbers) if self.lines else f"{first_few('row', numbers)}, counted from 0"


def _read_list(path: Path, file: str, option: str) -> list[Any] | None:
    """Return the rows of a file that is one JSON array, or None: then there is one object a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        # Several objects are no document of JSON either; only what begins as an array was meant as one.
        if isinstance(error, json.JSONDecodeError) and not text.lstrip().startswith("["):
            return None
        raise DataError(f"{option}: {file!r} cannot be read as json: {error}") from error
    if content == []:
        raise DataError(f"{option} {file!r} has no rows.")
    return content if isinstance(content, list) else None


def _kind(value: Any) -> str:
    numbers = {bool: "a boolean", int: "a number", float: "a number"}
    names = numbers | {list: "a list", dict: "an object", str: "a text", type(None): "null"}
    return names.get(type(value), type(value).__name__)
