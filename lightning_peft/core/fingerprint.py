"""Recognising a base model again: its tensors' names, shapes and a few sampled values."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.names import plain_name
from lightning_peft.core.registry import registries
from lightning_peft.errors import BaseMismatchError, CheckpointError, did_you_mean

SAMPLES = 8
"""Values that are kept of each tensor."""


def base_tensors(model: nn.Module, within: str = "", saved: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The base's state by plain names: no adapters, and not the modules whose trained copies travel with an adapter.

    Those (a new task head, say) may be initialised differently each time, and their own values are never read.

    Args:
        model: the network, with or without adapters.
        within: path of the part that is meant; the names are seen from there.
        saved: paths in the part of the modules that are left out; None for those of every adapter of ``model``.
    """
    left_out: set[str] = set()
    tops: list[str] = []
    for prefix, _, registry in registries(model):
        dot = f"{prefix}." if prefix else ""
        left_out.update(dot + key for key in registry.own_keys())
        tops += [
            plain_name(f"{dot}{path}.") for attachment in registry.attachments.values() for path in attachment.saved
        ]
    start = f"{within}." if within else ""
    if saved is not None:
        tops = [f"{start}{path}." for path in saved]
    state = {plain_name(key): tensor for key, tensor in model.state_dict(keep_vars=True).items() if key not in left_out}
    return {
        key.removeprefix(start): tensor
        for key, tensor in state.items()
        if isinstance(tensor, Tensor) and key.startswith(start) and not key.startswith(tuple(tops))
    }


@torch.no_grad()
def fingerprint(model: nn.Module, within: str = "", saved: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe the base of ``model`` by ``names``, ``shapes``, ``dtypes`` and ``samples`` (names, 8), in fp64.

    The arguments are those of :func:`base_tensors`.
    """
    tensors = base_tensors(model, within, saved)
    samples = [_sample(tensor) for tensor in tensors.values()]
    return {
        "names": list(tensors),
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "samples": torch.stack(samples) if samples else torch.zeros(0, SAMPLES, dtype=torch.float64),
    }


def check_base(model: nn.Module, recorded: Any, saved: tuple[str, ...] = ()) -> None:
    """Compare the base of ``model`` with a recorded fingerprint. Another dtype of the same weights passes.

    Args:
        model: the model that an adapter is about to be loaded into.
        recorded: what :func:`fingerprint` gave when the adapter was saved.
        saved: paths of the modules that travel with the adapter, when it is not attached yet.

    Raises:
        BaseMismatchError: names the first tensor that differs.
        CheckpointError: ``recorded`` is not a fingerprint.
    """
    tops = tuple(f"{plain_name(path)}." for path in saved)
    compare({key: tensor for key, tensor in base_tensors(model).items() if not key.startswith(tops)}, recorded, model)


def compare(here: Mapping[str, Tensor], recorded: Any, model: nn.Module) -> None:
    """Compare the base ``here``, :func:`base_tensors` of ``model``, with a recorded fingerprint.

    Raises:
        BaseMismatchError: names the first tensor that differs.
        CheckpointError: ``recorded`` is not a fingerprint.
    """
    names, shapes, dtypes, samples = _columns(recorded)
    remedy = "Load the base model that the adapter was trained on."
    for name, shape, dtype, sample in zip(names, shapes, dtypes, samples, strict=True):
        if name not in here:
            raise BaseMismatchError(
                f"The adapter belongs to another base: it was trained beside a tensor '{name}', which "
                f"{type(model).__name__} does not have.{did_you_mean(str(name), here)} {remedy}"
            )
        if list(here[name].shape) != shape:
            raise BaseMismatchError(
                f"The adapter belongs to another base: '{name}' has shape {list(here[name].shape)} here and {shape} "
                f"where the adapter was trained. {remedy}"
            )
        if here[name].is_meta:
            continue
        found, wanted = _sample(here[name]), sample
        if not torch.allclose(found, wanted, rtol=0, atol=_tolerance(here[name].dtype, dtype, wanted), equal_nan=True):
            raise BaseMismatchError(
                f"The adapter belongs to another base: the weights of '{name}' differ from those it was trained beside "
                f"(sampled {_short(found)} here, {_short(wanted)} there). {remedy} If it is a new layer that starts at "
                "random, it has to be trained whole (modules_to_save)."
            )
    if extra := [name for name in here if name not in set(names)]:
        raise BaseMismatchError(
            f"The adapter belongs to another base: '{extra[0]}' of {type(model).__name__} was not there when the "
            f"adapter was trained. {remedy}"
        )


def _columns(recorded: Any) -> tuple[list[str], list[Any], list[Any], Tensor]:
    try:
        names, shapes, dtypes = list(recorded["names"]), list(recorded["shapes"]), list(recorded["dtypes"])
        samples: Tensor = recorded["samples"].double()
        consistent = samples.shape == (len(names), SAMPLES) and len(names) == len(shapes) == len(dtypes)
        consistent = consistent and all(isinstance(name, str) for name in names)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"The record of the base model in this file is damaged ({error!r}).") from error
    if not consistent:
        raise CheckpointError("The record of the base model in this file is damaged: its columns do not fit together.")
    return names, shapes, dtypes, samples


def check_own_base(state: Mapping[str, Any], recorded: Any) -> None:
    """Compare the base's tensors in a file that holds them with what the same file records of them.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    names, _, dtypes, samples = _columns(recorded)
    for name, dtype, sample in zip(names, dtypes, samples, strict=True):
        there = state.get(name)
        if not isinstance(there, Tensor) or there.is_meta:
            continue  # whether it has to be there depends on the model
        found = str(there.dtype).removeprefix("torch.")
        if found != dtype or not torch.allclose(_sample(there), sample, rtol=1e-6, atol=0, equal_nan=True):
            raise CheckpointError(
                f"'{name}' is {found} {_short(_sample(there))} in the file, whose own record says {dtype} "
                f"{_short(sample)}: it was changed after it was saved."
            )


def _sample(tensor: Tensor) -> Tensor:
    """Eight values at evenly spread positions, in fp64 on the CPU."""
    if tensor.is_meta or tensor.numel() == 0:
        return torch.zeros(SAMPLES, dtype=torch.float64)
    places = [i * (tensor.numel() - 1) // (SAMPLES - 1) for i in range(SAMPLES)]
    return tensor.detach().flatten()[torch.tensor(places, device=tensor.device)].to("cpu", torch.float64)


def _tolerance(here: torch.dtype, recorded: Any, values: Tensor) -> float:
    """What rounding to the coarser of the two dtypes may change, against the largest sampled value."""
    largest = float(values.abs().nan_to_num().max()) if values.numel() else 0.0
    there = getattr(torch, str(recorded), None)
    floats = [dtype for dtype in (here, there) if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    return 2 * max((torch.finfo(dtype).eps for dtype in floats), default=0.0) * largest


def _short(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values[:4].tolist()) + ", …]"
