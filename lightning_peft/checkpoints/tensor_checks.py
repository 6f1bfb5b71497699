"""Checks of a tensor of a file that is to become one of an adapter's."""

from collections.abc import Sequence

from torch import Tensor

from lightning_peft.errors import AdapterKeyError, CheckpointError


def check_tensor(
    key: str, found: Tensor, shape: Sequence[int], like: Tensor, trained: bool, exact: bool = True
) -> None:
    """Raise unless ``found`` has the shape of an adapter's tensor, and numbers of its kind.

    Args:
        key: its name in the file.
        found: what the file holds.
        shape: what it has to have there.
        like: the adapter's tensor.
        trained: whether that is a parameter; buffers have the precision of the base that was there.
        exact: whether a parameter has to have the very dtype of ``like``.

    Raises:
        AdapterKeyError: it has not.
        CheckpointError: a parameter has values that are no numbers.
    """
    if list(found.shape) != list(shape):
        raise AdapterKeyError(f"'{key}' is {list(found.shape)} in the file and must have shape {list(shape)}.")
    alike = found.is_floating_point() == like.is_floating_point()
    if not alike or (exact and trained and found.dtype != like.dtype):
        raise AdapterKeyError(f"'{key}' is {found.dtype} in the file and must be {like.dtype}: it is damaged.")
    if trained:
        check_finite(key, found)


def check_finite(key: str, found: Tensor) -> None:
    """Raise if what is to become a parameter has values that are no numbers.

    Raises:
        CheckpointError: it has.
    """
    if found.is_floating_point() and not found.isfinite().all():
        raise CheckpointError(
            f"'{key}' holds NaN or infinite values: the training that wrote the file had diverged. Use an earlier "
            "checkpoint."
        )
