"""Every layer type that can carry a weight-shaped adapter, each seen as one matrix of shape (out, in).

A :class:`Host` is one weight of one module. Its :class:`Layout` says how the weight turns into a matrix and back, and
how the two halves of a low-rank product act on the layer's input and output. A new layer type is a layout (if none
fits) and one function registered with :func:`weights_of`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_peft.core.walk import base_modules, join, parent
from lightning_peft.errors import NotApplicableError
from lightning_peft.optional import hf_conv1d


@dataclass(frozen=True)
class Layout:
    """A weight stored as (out, in), as ``nn.Linear`` does."""

    out_features: int
    in_features: int

    def matrix(self, weight: Tensor) -> Tensor:
        """View the layer's own ``weight`` as (out, in)."""
        return weight

    def native(self, matrix: Tensor) -> Tensor:
        """Give ``matrix`` (out, in) the shape of the layer's own weight."""
        return matrix

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Apply ``a`` (r, in) to the layer's input: (..., in) -> (..., r)."""
        return F.linear(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """Apply ``b`` (out, r) to what :meth:`down` made: (..., r) -> (..., out)."""
        return F.linear(h, b)

    def channels(self, vector: Tensor) -> Tensor:
        """Give ``vector`` (out,) the shape in which it multiplies the channels of the layer's output (or input)."""
        return vector


@dataclass(frozen=True)
class TransposedLayout(Layout):
    """A weight stored as (in, out): the ``Conv1D`` of GPT-2."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def native(self, matrix: Tensor) -> Tensor:
        return matrix.T


@dataclass(frozen=True)
class EmbeddingLayout(TransposedLayout):
    """A table (entries, features), seen as (features, entries): its input is an index, that is, a one-hot vector."""

    padding_idx: int | None = None
    scale_grad_by_freq: bool = False

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


@dataclass(frozen=True)
class ConvLayout(Layout):
    """A kernel (out, in / groups, *k), seen as (out, in / groups · prod k): with groups, all groups share ``a``."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    border: tuple[int, ...] = ()  # of torch.nn.functional.pad, where padding_mode is not "zeros"

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def native(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], -1, *self.kernel)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.border, mode=self.padding_mode), 0  # type: ignore[assignment]
        kernel = self.native(a)
        if self.groups > 1:
            kernel = kernel.repeat(self.groups, *[1] * (kernel.dim() - 1))  # (groups · r, in / groups, *k)
        return self._convolve(x, kernel, None, self.stride, padding, self.dilation, self.groups)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return self._convolve(h, b.reshape(*b.shape, *[1] * len(self.kernel)), groups=self.groups)

    def channels(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * len(self.kernel))

    def _convolve(self, *args: Any, **kwargs: Any) -> Tensor:
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        out: Tensor = convolve(*args, **kwargs)
        return out


@dataclass(frozen=True)
class Host:
    """One weight of one module of a model."""

    name: str
    """What target patterns match: ``encoder.0.self_attn.in_proj``."""
    path: str
    """Path of the module whose forward runs: ``encoder.0.self_attn``."""
    module: nn.Module
    parameter: str
    """Path of the weight from the module: ``in_proj_weight``, ``out_proj.weight``."""
    layout: Layout
    reads_weight: bool = False
    """Whether the module reads this weight in a larger computation, so that only the weight can be adapted."""
    bias: str = ""
    """Path of the bias that goes with the weight, from the module; empty where there is none."""
    bias_start: int = 0
    """Where this weight's ``layout.out_features`` entries begin in that bias."""
    fresh: bool = False
    """Whether the module returns a new tensor that nothing else reads, its own backward included."""

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
        """Whether the weight is a matrix that multiplies a vector of features (not a kernel, not a table)."""
        return type(self.layout) in (Layout, TransposedLayout)

    @property
    def part(self) -> str:
        """The part of a slot's name that tells this weight from the module's others; empty for the usual one."""
        return "" if self.parameter == "weight" else self.parameter.replace(".", "_")


@dataclass(frozen=True)
class Weight:
    """One weight of a module: what :class:`Host` says of it, seen from the module alone."""

    layout: Layout
    parameter: str = "weight"
    name: str = ""
    """Name below the module; empty where the module itself is meant."""
    reads_weight: bool = False
    bias: str = ""
    bias_start: int = 0
    fresh: bool = False


@singledispatch
def weights_of(module: nn.Module) -> tuple[Weight, ...]:
    """The weights of ``module`` that can be adapted."""
    if (conv1d := hf_conv1d()) and isinstance(module, conv1d):
        size_in, size_out = module.get_parameter("weight").shape
        layout = TransposedLayout(size_out, size_in)
        return (Weight(layout, bias="bias", fresh=type(module).forward is conv1d.forward),)
    return ()


@weights_of.register
def _(module: nn.Linear) -> tuple[Weight, ...]:
    layout = Layout(module.out_features, module.in_features)
    # A subclass may return anything, such as the output of an activation, which the activation's backward reads.
    return (Weight(layout, bias=_bias(module), fresh=type(module).forward is nn.Linear.forward),)


@weights_of.register
def _(module: nn.Embedding) -> tuple[Weight, ...]:
    layout = EmbeddingLayout(module.embedding_dim, module.num_embeddings, module.padding_idx, module.scale_grad_by_freq)
    return (Weight(layout),)


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
        tuple(module._reversed_padding_repeated_twice),
    )
    return (Weight(layout, bias=_bias(module)),)


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
            owner = parent(weight.parameter)
            if owner:
                claimed.add(id(module.get_submodule(owner)))
            name = join(path, weight.name)
            yield Host(
                name=name,
                path=path,
                module=module,
                parameter=weight.parameter,
                layout=weight.layout,
                reads_weight=weight.reads_weight,
                bias=weight.bias,
                bias_start=weight.bias_start,
                fresh=weight.fresh,
            )


def read_parameters(module: nn.Module) -> tuple[str, ...]:
    """Paths of the parameters and persistent buffers that the forward of ``module`` itself reads.

    Its own, and those of children that have no forward that could run: lists and dictionaries of parameters, and the
    ``out_proj`` of ``nn.MultiheadAttention``.
    """
    owned = [name for name, _ in module.named_parameters(recurse=False)]
    transient = module._non_persistent_buffers_set
    owned += [name for name, _ in module.named_buffers(recurse=False) if name not in transient]
    for child, part in module.named_children():
        attention = isinstance(module, nn.MultiheadAttention) and child == "out_proj"
        if attention or isinstance(part, (nn.ParameterList, nn.ParameterDict)):
            owned += [f"{child}.{name}" for name, _ in part.named_parameters(recurse=False)]
    return tuple(owned)
