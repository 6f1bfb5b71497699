"""bitsandbytes: NF4 and FP4 in blocks with scales that may be quantized themselves, and int8 by rows."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.network.quantized.weights import Quantized, reads
from lightning_peft.optional import bitsandbytes_functions


@reads("bitsandbytes.nn.modules.Params4bit")
def _four_bits(module: nn.Module, name: str, weight: Any) -> Quantized | None:
    if weight.quant_state is None:  # it is quantized when it is moved to its device
        return None
    bnb, weight_shape = bitsandbytes_functions(), torch.Size(weight.quant_state.shape)

    def state() -> Any:
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            module.state_dict()  # in eval some CPUs get another order of the bits, which is undone here
        return weight.quant_state

    def error() -> Tensor:
        found = state()
        levels, scales, more = found.code.sort().values, found.absmax, 0.0
        if found.nested:  # the scales are quantized themselves
            scales = bnb.dequantize_blockwise(scales, found.state2) + found.offset
            more = 0.5 * found.state2.code.sort().values.diff().max() * found.state2.absmax.max()
        each: Tensor = 0.5 * levels.diff().max() * scales.float() + more
        return each.repeat_interleave(found.blocksize)[: weight_shape.numel()].view(weight_shape)

    def dequantize() -> Tensor:
        found = state()  # first: it may write the weight anew
        plain: Tensor = bnb.dequantize_4bit(weight.data, found)
        return plain

    scheme = str(weight.quant_state.quant_type)
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"quant_state.bitsandbytes__{scheme}")
    return Quantized(
        scheme=scheme,
        shape=weight_shape,
        dequantize=dequantize,
        error=error,
        beside=frozenset(f"{name}.{part}" for part in parts),
        attributes=(
            "compute_dtype",
            "compute_type_is_set",
            "quant_state",
            "quant_storage",
            "support_avx512bf16_for_cpu",
        ),
    )


@reads("bitsandbytes.nn.modules.Int8Params")
def _eight_bits(module: nn.Module, name: str, weight: Any) -> Quantized | None:
    if weight.dtype != torch.int8:  # not yet, or only while it computes
        return None

    def scales() -> Tensor:
        held = weight.SCB if weight.SCB is not None else vars(module)["state"].SCB  # from the first forward on
        rows: Tensor = held.to(weight.device, torch.float32)
        return rows.unsqueeze(1) / 127

    return Quantized(
        scheme="int8",
        shape=weight.shape,
        dequantize=lambda: weight.detach() * scales(),
        error=lambda: 0.6 * scales(),  # of half a step, and of the cast to fp16 before
        beside=frozenset(("SCB", "weight_format")),
        attributes=("state", "index"),
    )
