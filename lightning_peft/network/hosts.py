"""Every layer type that can carry a weight-shaped adapter, each seen as one matrix of shape (out, in).

A :class:`Host` is one weight of one module. Its :class:`Layout` says how the weight turns into a matrix and back, and
how the two halves of a low-rank product act on the layer's input and output. A new layer type is a layout (if none
fits) and one function registered with :func:`weights_of`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_peft.errors import NotApplicableError
from lightning_peft.network.forwards import has_known_forward, scaling_attribute
from lightning_peft.network.layouts import ConvLayout, EmbeddingLayout, Layout, TransposedLayout
from lightning_peft.network.quantized.weights import is_quantized
from lightning_peft.network.reads import only_read
from lightning_peft.network.walk import base_modules, join, parent
from lightning_peft.optional import hf_conv1d


@dataclass(frozen=True)
class Weight:
    """One weight of a module that can be adapted."""

    layout: Layout
    parameter: str = "weight"
    """Path of the weight from the module: ``in_proj_weight``, ``out_proj.weight``."""
    name: str = ""
    """Name below the module; empty where the module itself is meant."""
    weight_only: bool = False
    """True if the module, or one above it, computes something of its own with this weight, so that only the weight can
    be adapted."""
    bias: str = ""
    """Path of the bias that goes with the weight, from the module; empty where there is none."""
    bias_start: int = 0
    """Where this weight's ``layout.out_features`` entries begin in that bias."""
    owns_output: bool = False
    """True if the module returns a new tensor that nothing else reads, its own backward included."""


@dataclass(frozen=True, kw_only=True)
class Host(Weight):
    """One weight of one module of a model. Target patterns match its ``name``: ``encoder.0.self_attn.in_proj``."""

    path: str
    """Path of the module whose forward runs: ``encoder.0.self_attn``."""
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight itself, in the layer's own shape.

        Raises:
            NotApplicableError: it is no parameter but computed from others.
        """
        own = self.module._parameters.get(self.parameter)
        if own is not None:  # as nearly always, and faster
            return own
        try:
            return self.module.get_parameter(self.parameter)
        except AttributeError as error:
            raise NotApplicableError(
                f"The {self.parameter} of '{self.name}' is computed (a parametrization such as weight_norm) and cannot "
                "be adapted. Remove the parametrization first, or leave the layer out (exclude_modules)."
            ) from error

    @property
    def linear(self) -> bool:
        """True if the weight is a matrix that multiplies a vector of features (not a kernel, not a table)."""
        return type(self.layout) in (Layout, TransposedLayout)

    @property
    def part(self) -> str:
        """The part of a slot's name that tells this weight from the module's others; empty for the usual one."""
        return "" if self.parameter == "weight" else self.parameter.replace(".", "_")


@singledispatch
def weights_of(module: nn.Module) -> tuple[Weight, ...]:
    """The weights of ``module`` that can be adapted."""
    if (conv1d := hf_conv1d()) and isinstance(module, conv1d):
        size_in, size_out = module.get_parameter("weight").shape
        layout = TransposedLayout(size_out, size_in)
        own = not has_known_forward(module, conv1d)
        return (Weight(layout, weight_only=own, bias="bias", owns_output=type(module).forward is conv1d.forward),)
    return ()


@weights_of.register
def _(module: nn.Linear) -> tuple[Weight, ...]:
    layout = Layout(module.out_features, module.in_features)
    # A subclass may return anything, such as the output of an activation, which the activation's backward reads.
    fresh, own = type(module).forward is nn.Linear.forward, not has_known_forward(module, nn.Linear)
    return (Weight(layout, weight_only=own, bias=_bias(module), owns_output=fresh),)


@weights_of.register
def _(module: nn.Embedding) -> tuple[Weight, ...]:
    scale = _output_scale(module)
    layout = EmbeddingLayout(
        module.embedding_dim,
        module.num_embeddings,
        module.padding_idx,
        module.scale_grad_by_freq,
        1.0 if scale is None else scale,
    )
    return (Weight(layout, weight_only=scale is None),)


def _output_scale(module: nn.Embedding) -> float | None:
    """The number by which an embedding multiplies the rows that it looks up; None where it may do something else."""
    kinds = [kind for kind in type(module).__mro__ if "forward" in vars(kind)]
    if kinds[0] is nn.Embedding or is_quantized(module.weight):
        return 1.0
    name = scaling_attribute(vars(kinds[0])["forward"]) if kinds[1] is nn.Embedding else None
    scale = None if name is None else getattr(module, name, None)
    if isinstance(scale, Tensor):
        scale = None if scale.is_meta or scale.numel() != 1 else float(scale)
    if not isinstance(scale, (int, float)):
        return None
    return float(torch.tensor(scale, dtype=module.weight.dtype, device="cpu"))  # as the layer rounds it


@weights_of.register(nn.Conv1d)
@weights_of.register(nn.Conv2d)
@weights_of.register(nn.Conv3d)
def _(module: Any) -> tuple[Weight, ...]:
    layout = ConvLayout(
        module.out_channels,
        module.weight.shape[1:].numel(),
        tuple(module.kernel_size),
        tuple(module.stride),
        module.padding if isinstance(module.padding, str) else tuple(module.padding),
        tuple(module.dilation),
        module.groups,
        module.padding_mode,
        # Read and not computed anew: torch knows what padding="same" comes to.
        tuple(module._reversed_padding_repeated_twice),
    )
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(module.kernel_size) - 1]
    return (Weight(layout, weight_only=not has_known_forward(module, kind), bias=_bias(module)),)


@weights_of.register
def _(module: nn.MultiheadAttention) -> tuple[Weight, ...]:
    d, bias = module.embed_dim, _bias(module, "in_proj_bias")
    if module.in_proj_weight is not None:
        inputs = [Weight(Layout(3 * d, d), "in_proj_weight", "in_proj", True, bias)]
    else:
        sizes = {"q_proj": d, "k_proj": module.kdim, "v_proj": module.vdim}
        inputs = [
            Weight(Layout(d, size), f"{name}_weight", name, True, bias, i * d)
            for i, (name, size) in enumerate(sizes.items())
        ]
    # out_proj is a module, but its forward never runs: the attention reads its weight.
    bias = "out_proj.bias" if _bias(module.out_proj) else ""
    return (*inputs, Weight(Layout(d, d), "out_proj.weight", "out_proj", True, bias))


def _bias(module: nn.Module, name: str = "bias") -> str:
    return name if module._parameters.get(name) is not None else ""


def find_hosts(model: nn.Module) -> Iterator[Host]:
    """Yield every host of ``model``, in the order of its modules.

    Raises:
        NotApplicableError: a lazy layer has no weight yet.
    """
    claimed: set[int] = set()
    read = only_read(model)
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if isinstance(parameter, UninitializedParameter):
                raise NotApplicableError(
                    f"{type(module).__name__} at '{path}' has no {name} yet (a lazy layer). "
                    "Run one batch through the model before adding an adapter."
                )
        if id(module) in claimed:
            continue
        for weight in weights_of(module):
            # A child whose weight its parent reads never runs, so it is no host of its own.
            if owner := parent(weight.parameter):
                claimed.add(id(module.get_submodule(owner)))
            own = {**vars(weight), "name": join(path, weight.name)}
            own["weight_only"] = weight.weight_only or id(module) in read
            yield Host(**own, path=path, module=module)
