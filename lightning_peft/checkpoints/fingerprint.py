"""Recognising a base model again: its tensors' names, shapes and a few sampled values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import BaseMismatchError, CheckpointError, did_you_mean
from lightning_peft.injection.registry import registries
from lightning_peft.network.quantized.weights import Quantized, is_quantized, perhaps_rounded, quantized_weights
from lightning_peft.network.walk import below, join, plain_name, within

SAMPLES = 8
"""Values that are kept of each tensor."""
Base = dict[str, Tensor | Quantized]


def fingerprint_tensors(model: nn.Module, part: str = "", fully_trained: Sequence[str] | None = None) -> "Base":
    """The base's state by plain names: no adapters, and not the modules whose trained copies travel with an adapter.

    Such a module (a new task head, say) may be initialised differently each time, and its own values are never read. A
    quantized weight is one entry, without what its module keeps beside it.

    Args:
        model: the network, with or without adapters.
        part: path of the part that is meant; the names are seen from there.
        fully_trained: paths, in the part, of modules to leave out; None for the modules of every adapter of ``model``.
    """
    left_out: set[str] = set()
    tops: list[str] = []
    for prefix, _, registry in registries(model):
        left_out.update(join(prefix, key) for key in registry.own_keys())
        tops += [plain_name(join(prefix, path)) for a in registry.attachments.values() for path in a.fully_trained]
    # By what they stand for, since each package keeps them in its own way.
    weights: dict[str, Quantized] = {}
    for path, module, name, weight in quantized_weights(model):
        biases = {other: p for other, p in module._parameters.items() if p is not None and not is_quantized(p)}
        weights |= {join(path, other): perhaps_rounded(p) for other, p in biases.items()}
        weights[join(path, name)] = weight
        left_out.update(join(path, key) for key in weight.beside)
    if fully_trained is not None:
        tops = [join(part, path) for path in fully_trained]
    # keep_vars: no copies of the base, only its names and shapes are looked at here.
    state = {
        plain_name(key): weights.get(key, tensor)
        for key, tensor in model.state_dict(keep_vars=True).items()
        if key not in left_out
    }
    return {
        below(key, part): tensor
        for key, tensor in state.items()
        if isinstance(tensor, (Tensor, Quantized)) and within(key, [part]) and not within(key, tops)
    }


@torch.no_grad()
def fingerprint(model: nn.Module, part: str = "", fully_trained: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe the base of ``model`` by ``names``, ``shapes``, ``dtypes`` and ``samples`` (names, 8), in fp64.

    Of a base with quantized weights also by ``errors``: how far the samples may lie from the unquantized base's own,
    None for weights that are not quantized.

    The arguments are those of :func:`fingerprint_tensors`.
    """
    tensors = fingerprint_tensors(model, part, fully_trained)
    samples = [_sample_of(tensor) for tensor in tensors.values()]
    # No column where nothing is quantized: it would hold a null for every tensor.
    errors = {} if all(s.error is None for s in samples) else {"errors": [s.error for s in samples]}
    values = [s.values for s in samples]
    return {
        "names": list(tensors),
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "dtypes": [s.dtype for s in samples],
        "samples": torch.stack(values) if values else torch.zeros(0, SAMPLES, dtype=torch.float64),
        **errors,
    }


def check_base(model: nn.Module, recorded: Any, fully_trained: Sequence[str] = ()) -> None:
    """Compare the base of ``model`` with a recorded fingerprint.

    Another dtype or a quantized copy of the same weights passes.

    Args:
        model: the model that an adapter is about to be loaded into.
        recorded: what :func:`fingerprint` gave when the adapter was saved.
        fully_trained: paths of the modules that travel with the adapter, when it is not attached yet.

    Raises:
        BaseMismatchError: names the first tensor that differs.
        CheckpointError: ``recorded`` is not a fingerprint.
    """
    tops = [plain_name(path) for path in fully_trained]
    here = {key: tensor for key, tensor in fingerprint_tensors(model).items() if not within(key, tops)}
    compare(here, recorded, model)


def compare(here: Mapping[str, Tensor | Quantized], recorded: Any, model: nn.Module) -> None:
    """Compare the base ``here``, :func:`fingerprint_tensors` of ``model``, with a recorded fingerprint.

    Raises:
        BaseMismatchError: names the first tensor that differs.
        CheckpointError: ``recorded`` is not a fingerprint.
    """
    remedy = "Load the base model that the adapter was trained on."
    names = set()
    for name, shape, dtype, sample, error in _rows(recorded):
        names.add(name)
        if name not in here:
            raise BaseMismatchError(
                f"The adapter belongs to another base: it was trained beside a tensor '{name}', which "
                f"{type(model).__name__} does not have.{did_you_mean(str(name), here)} {remedy}"
            )
        tensor = here[name]
        turned = (error is not None or isinstance(tensor, Quantized)) and len(shape) == len(tensor.shape) == 2
        if list(tensor.shape) != shape and not (turned and list(tensor.shape) == shape[::-1]):
            raise BaseMismatchError(
                f"The adapter belongs to another base: '{name}' has shape {list(tensor.shape)} here and {shape} "
                f"where the adapter was trained. {remedy}"
            )
        # Names and shapes are all that a base on the meta device has.
        if isinstance(tensor, Tensor) and tensor.is_meta:
            continue
        seen = _sample_of(tensor)
        # Packages that quantize the (in, out) weight of a Conv1D keep it as (out, in).
        if not seen.fits(sample, dtype, error) and not (
            turned and _sample_of(tensor, turn=True).fits(sample, dtype, error)
        ):
            raise BaseMismatchError(
                f"The adapter belongs to another base: the weights of '{name}' differ from those it was trained beside "
                f"(sampled {_short(seen.values)} here, {_short(sample)} there). {remedy} If it is a new layer "
                "that starts at random, it has to be fully trained (modules_to_save)."
            )
    if extra := [name for name in here if name not in names]:
        raise BaseMismatchError(
            f"The adapter belongs to another base: '{extra[0]}' of {type(model).__name__} was not there when the "
            f"adapter was trained. {remedy}"
        )


def _rows(recorded: Any) -> list[tuple[str, Any, Any, Tensor, float | None]]:
    """The name, shape, dtype, samples and error of each recorded tensor."""
    try:
        names, shapes, dtypes = list(recorded["names"]), list(recorded["shapes"]), list(recorded["dtypes"])
        errors = list(recorded.get("errors") or [None] * len(names))
        samples: Tensor = recorded["samples"].double()
        # Compared within the try: damaged values may not even have a length.
        consistent = samples.shape == (len(names), SAMPLES)
        consistent = consistent and len(names) == len(shapes) == len(dtypes) == len(errors)
        consistent = consistent and all(isinstance(name, str) for name in names)
        consistent = consistent and all(error is None or type(error) is float for error in errors)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"The record of the base model in this file is damaged ({error!r}).") from error
    if not consistent:
        raise CheckpointError("The record of the base model in this file is damaged: its columns do not fit together.")
    return list(zip(names, shapes, dtypes, samples, errors, strict=True))


def check_own_base(state: Mapping[str, Any], recorded: Any) -> None:
    """Compare the base's tensors in a file that holds them with what the same file records of them.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    for name, _, dtype, sample, error in _rows(recorded):
        there = state.get(name)
        if not isinstance(there, Tensor) or there.is_meta or error is not None:
            continue  # whether it has to be there depends on the model; quantized it is not the same tensor
        seen = _sample_of(there)
        if seen.dtype != dtype or not torch.allclose(seen.values, sample, rtol=1e-6, atol=0, equal_nan=True):
            raise CheckpointError(
                f"'{name}' is {seen.dtype} {_short(seen.values)} in the file, whose own record says {dtype} "
                f"{_short(sample)}: it was changed after it was saved."
            )


@dataclass(frozen=True)
class TensorSample:
    """A sample of a base tensor, by which it is recognised."""

    values: Tensor
    """Eight values at evenly spread positions, in fp64 on the CPU."""
    dtype: str
    error: float | None
    """How far they may lie from the unquantized weight's; None where it is not quantized."""
    precision: torch.dtype

    def fits(self, values: Tensor, dtype: Any, error: float | None) -> bool:
        """True if this is what was recorded, but for what rounding and quantizing may have changed."""
        apart = _tolerance(self.precision, dtype, values) + (self.error or 0.0) + (error or 0.0)
        return torch.allclose(self.values, values, rtol=0, atol=apart, equal_nan=True)


def _sample_of(weight: Tensor | Quantized, turn: bool = False) -> TensorSample:
    """Look at a weight, or at its transpose (``turn``)."""
    if isinstance(weight, Tensor):
        own = weight.detach()
        return TensorSample(_sample(own.T if turn else own), str(own.dtype).removeprefix("torch."), None, own.dtype)
    values, error = weight.dequantize(), weight.error().expand(weight.shape)
    samples = (_sample(tensor.T if turn else tensor) for tensor in (values, error))
    return TensorSample(next(samples), weight.scheme, float(next(samples).max()), values.dtype)


def _sample(tensor: Tensor) -> Tensor:
    if tensor.is_meta or tensor.numel() == 0:
        return torch.zeros(SAMPLES, dtype=torch.float64)
    places = [i * (tensor.numel() - 1) // (SAMPLES - 1) for i in range(SAMPLES)]
    return tensor.flatten()[torch.tensor(places, device=tensor.device)].to("cpu", torch.float64)


def _tolerance(here: torch.dtype, recorded: Any, values: Tensor) -> float:
    """What rounding to the coarser of the two dtypes may change, against the largest sampled value."""
    largest = float(values.abs().nan_to_num().max()) if values.numel() else 0.0
    there = getattr(torch, str(recorded), None)
    floats = [dtype for dtype in (here, there) if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    return 2 * max((torch.finfo(dtype).eps for dtype in floats), default=0.0) * largest


def _short(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values[:4].tolist()) + ", …]"
