"""From a column of labels to class indices: functions with no state."""

from typing import TYPE_CHECKING, Any

from lightning_peft.data.sources.loading import Source, first_rows
from lightning_peft.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from datasets import ClassLabel


def infer_label_names(train: Source, column: str) -> list[str]:
    """Return the names of the classes, in the order of their indices.

    These are the names of a ``ClassLabel`` column, else the distinct labels of the training rows, sorted (numbers as
    numbers, so that 0 .. k-1 keep their value as index).

    Raises:
        DataError: If a row has no label, labels are not text or integers, or there are fewer than two.
    """
    values = _label_values(train, column)
    class_label = _class_label(train, column)
    names = list(class_label.names) if class_label else [str(value) for value in sorted(values)]
    if len(names) < 2:
        raise DataError(
            f"{train.origin}: column {column!r} (label_column) has only one label, {names[0]!r}. "
            "A classifier needs at least two."
        )
    return names


def find_label_ids(source: Source, column: str, names: list[str]) -> dict[Any, int]:
    """Return the class index of every value that the column holds.

    A value is looked up by its name. Plain integers are also taken as indices, if the names are not numbers.

    Args:
        source: The rows.
        column: The label column.
        names: The names of the classes.

    Raises:
        DataError: If a row has no label, or one that is not among the names.
    """
    values = _label_values(source, column)
    class_label = _class_label(source, column)
    index = {name: position for position, name in enumerate(names)}
    # Not isinstance: booleans are integers to it, but their names are "False" and "True".
    if class_label is None and all(type(value) is int for value in values) and not all(map(_is_number, names)):
        ids = {value: value for value in values if 0 <= value < len(names)}
    else:
        named = {value: class_label.int2str(value) if class_label else str(value) for value in values}
        ids = {value: index[name] for value, name in named.items() if name in index}
    for value in values:
        if value not in ids:
            label = class_label.int2str(value) if class_label else value
            rows = [row for row, other in enumerate(source.rows[column][:]) if other == value]
            raise DataError(
                f"{source.origin}: label {label!r} of {first_rows(rows)} is not among the {len(names)} labels "
                f"{_shortened(names)}.{did_you_mean(str(label), names)} "
                "Correct the row, or list all labels in label_names."
            )
    return ids


def is_unlabelled(source: Source, column: str) -> bool:
    """True if these are the test rows of a hub data set that withholds the labels (a ``ClassLabel``, all -1)."""
    return _class_label(source, column) is not None and set(source.rows.unique(column)) <= {-1, None}


def _class_label(source: Source, column: str) -> "ClassLabel | None":
    from datasets import ClassLabel

    feature = source.rows.features[column]
    return feature if isinstance(feature, ClassLabel) else None


def _label_values(source: Source, column: str) -> list[Any]:
    """Return the distinct labels, all there and all of one type that can be a label."""
    where = f"{source.origin}: column {column!r} (label_column)"
    feature = source.rows.features[column]
    dtype = getattr(feature, "dtype", type(feature).__name__)
    is_label = dtype in ("string", "large_string", "bool") or dtype.startswith(("int", "uint"))
    # A column of integers with a gap is read as floats, an empty one as null: then the gap is reported, below.
    if not is_label and dtype != "null" and not dtype.startswith("float"):
        raise DataError(f"{where} is of type {dtype}. Labels must be text or integers, one a row, all of one type.")
    values = source.rows.unique(column)
    missing = [value for value in values if _is_missing(value) or (_class_label(source, column) and value == -1)]
    if missing:
        rows = [row for row, value in enumerate(source.rows[column][:]) if value in missing]
        raise DataError(f"{where} is empty in {len(rows)} rows of {len(source.rows)}: {first_rows(rows)}. Label them.")
    if not is_label:
        raise DataError(
            f"{where} holds numbers with a fraction ({dtype}), for instance {values[0]!r}. "
            "Labels must be text or integers: this is classification, not regression."
        )
    return values


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _shortened(names: list[str]) -> str:
    return f"[{', '.join(map(repr, names[:10]))}{', …' if len(names) > 10 else ''}]"
