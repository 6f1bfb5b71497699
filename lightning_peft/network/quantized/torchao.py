"""torchao: tensors of classes of their own, which dequantize themselves."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_peft.network.quantized.weights import Quantized, reads


@reads("torchao.utils.TorchAOBaseTensor")
def _tensor_subclass(module: nn.Module, name: str, weight: Any) -> Quantized:
    return Quantized(
        scheme=type(weight).__name__,
        shape=weight.shape,
        dequantize=weight.dequantize,
        # Whatever the class, it has no fewer levels than four bits give.
        error=lambda: weight.dequantize().abs().amax() / 6,
        attributes=("extra_repr",),
    )


@reads("torchao.quantization.Int8Tensor")
@reads("torchao.quantization.IntxUnpackedToInt8Tensor")
def _whole_steps(module: nn.Module, name: str, weight: Any) -> Quantized:
    def error() -> Tensor:
        step: Tensor = weight.scale.float()
        for dim, size in enumerate(weight.block_size):
            step = step.repeat_interleave(size, dim)
        return step  # a whole one: the outermost value may have been cut off

    return replace(_tensor_subclass(module, name, weight), error=error)
