"""The parameters of a base: their kinds, the layers they belong to, and the modules that read them."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_peft.errors import NotApplicableError
from lightning_peft.network.hosts import find_hosts, weights_of
from lightning_peft.network.norms import is_norm
from lightning_peft.network.quantized.weights import is_quantized
from lightning_peft.network.walk import base_modules, join, leaf, parent, within

KINDS = ("weight", "bias", "norm", "embedding")
"""Matrices and kernels, bias vectors (of norms too), all of a norm, tables. Some parameters are none of these."""
COMPONENTS = ("norm", "embedding")
"""Kinds that target patterns may use as words."""
_BIAS = re.compile(r"(.*_)?bias(_.*)?")


@dataclass(frozen=True, eq=False)
class BaseParameter:
    """One parameter of the base at one module that reads it, or the part of it that belongs to one layer."""

    layer: str
    """What target patterns match: ``encoder.0.self_attn.in_proj``."""
    path: str
    """Path of the module whose forward reads it: ``encoder.0.self_attn``."""
    module: nn.Module
    name: str
    """Path of the parameter from that module: ``in_proj_bias``."""
    tensor: nn.Parameter
    kinds: frozenset[str]
    part: tuple[int, int] | None = None
    """First and last (exclusive) entry, where several layers share the parameter; None for all of it."""

    @property
    def full_name(self) -> str:
        """The name under which the model has it."""
        return join(self.path, self.name)


def find_parameters(model: nn.Module) -> list[BaseParameter]:
    """Every parameter of the base at every module that reads it, in the order of the modules.

    Raises:
        NotApplicableError: a lazy layer has no weight yet.
    """
    layers: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for host in find_hosts(model):
        layers.setdefault((host.path, host.parameter), []).append((host.name, 0, 0))
        if host.bias:
            end = host.bias_start + host.layout.out_features
            layers.setdefault((host.path, host.bias), []).append((host.name, host.bias_start, end))
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    found: list[BaseParameter] = []
    for path, module, names in readers(model):
        for name in names:
            tensor = module.get_submodule(parent(name))._parameters.get(leaf(name))
            if tensor is None:  # a buffer
                continue
            kinds = _kinds(module, leaf(name), tensor, tables)
            own = layers.get((path, name), [(join(path, parent(name)), 0, 0)])
            for layer, start, end in own:
                part = (start, end) if len(own) > 1 else None
                found.append(BaseParameter(layer, path, module, name, tensor, kinds, part))
    return found


def readers(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """Every module whose forward reads parameters itself, as (path, module, paths of these from the module)."""
    claimed: set[int] = set()
    for path, module in base_modules(model):
        if id(module) in claimed:
            continue
        names = read_parameters(module)
        claimed.update(id(module.get_submodule(parent(name))) for name in names if "." in name)
        if names:
            yield path, module, names


def read_parameters(module: nn.Module) -> tuple[str, ...]:
    """Paths of the parameters and persistent buffers that the forward of ``module`` itself reads.

    Its own, and those of children that it counts as its own: lists and dictionaries of parameters, and what holds a
    weight of its (``out_proj`` of ``nn.MultiheadAttention``).
    """
    owned = [name for name, _ in module.named_parameters(recurse=False)]
    transient = module._non_persistent_buffers_set
    owned += [name for name, _ in module.named_buffers(recurse=False) if name not in transient]
    holding = {parent(weight.parameter) for weight in weights_of(module)}
    for child, part in module.named_children():
        if child in holding or isinstance(part, (nn.ParameterList, nn.ParameterDict)):
            owned += [f"{child}.{name}" for name, _ in part.named_parameters(recurse=False)]
    return tuple(owned)


def check_trainable(tensor: Tensor, name: str) -> None:
    """Raise unless a copy of ``tensor`` could train.

    Raises:
        NotApplicableError: it is quantized, complex, or not there yet (a lazy layer).
    """
    if isinstance(tensor, UninitializedParameter):
        raise NotApplicableError(f"'{name}' has no values yet (a lazy layer). Run one batch through the model first.")
    packed = is_quantized(tensor)
    if packed or not tensor.is_floating_point():
        raise NotApplicableError(
            f"'{name}' cannot be trained: it is {type(tensor).__name__ if packed else tensor.dtype}, as after "
            "quantization. Leave it out, or train an adapter beside it (LoRA)."
        )


def unknown_weights(model: nn.Module) -> list[tuple[str, str]]:
    """Weights that multiply features and are no host's, as (name, reason): of experts, recurrent and bilinear layers.

    They are known by their names, or by a matrix for each of several experts; tables of positions have neither.
    """
    return [
        (p.full_name, f"no known layer: {type(p.module).__name__} holds it as {tuple(p.tensor.shape)}")
        for p in _unknown(model)
    ]


def expert_weights(model: nn.Module) -> list[BaseParameter]:
    """The :func:`unknown_weights` that hold a matrix for each of several experts."""
    return [p for p in _unknown(model) if _for_experts(p)]


def _unknown(model: nn.Module) -> list[BaseParameter]:
    known = {(host.path, host.parameter) for host in find_hosts(model)}
    return [
        p
        for p in find_parameters(model)
        if p.kinds == {"weight"} and (p.path, p.name) not in known and p.part is None
        if leaf(p.name).startswith("weight") or _for_experts(p)
    ]


def _for_experts(p: BaseParameter) -> bool:
    return p.tensor.dim() == 3 and p.tensor.shape[0] > 1 and not leaf(p.name).startswith("weight")


def count(parameters: Iterable[BaseParameter]) -> int:
    """How many numbers they hold; tied ones count once."""
    sizes = {(id(p.tensor), p.part): p.part[1] - p.part[0] if p.part else p.tensor.numel() for p in parameters}
    return sum(sizes.values())


def outside(parameters: Iterable[BaseParameter], fully_trained: Sequence[str]) -> list[BaseParameter]:
    """The ``parameters`` that are not fully trained with one of the modules ``fully_trained``."""
    return [p for p in parameters if not within(p.layer, fully_trained)]


def _kinds(module: nn.Module, name: str, tensor: nn.Parameter, tables: set[int]) -> frozenset[str]:
    kinds = set()
    if name == "bias" or (_BIAS.fullmatch(name) and tensor.dim() == 1):  # bias_k of an attention is a token
        kinds.add("bias")
    if is_norm(module):
        kinds.add("norm")
    if id(tensor) in tables:
        kinds.add("embedding")
    return frozenset(kinds or ({"weight"} if tensor.dim() > 1 or is_quantized(tensor) else ()))
