r"""IA3: keys, values and feedforward activations rescaled by learned vectors.

Liu et al., 2022, arXiv:2205.05638 (T-Few).

.. math:: y = l \odot (W x + b) \quad\text{for keys and values}, \qquad
          y = W (l \odot x) + b \quad\text{for the last layer of the FFN}

l starts at one, so training starts from the base model. Both are a change of W and b, and merge into them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, InputAdapter, OutputAdapter, WeightAdapter, adapter_dtype
from lightning_peft.core.fields import Patterns
from lightning_peft.core.method import Placement, Plan
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.core.recipes import Recipe
from lightning_peft.core.targeted import TargetedMethod
from lightning_peft.errors import NotApplicableError, TargetError
from lightning_peft.kernels.scale import scale_
from lightning_peft.network.blocks import find_blocks, find_roles
from lightning_peft.network.calls import first_input, with_first_input
from lightning_peft.network.hosts import Host, find_hosts
from lightning_peft.network.layouts import ConvLayout, EmbeddingLayout
from lightning_peft.network.patterns import Vocabulary, each_pattern
from lightning_peft.network.positions import has_rotary_positions
from lightning_peft.network.targets import select_hosts
from lightning_peft.network.walk import leaf, within

_BY_HEAD = {"query_key_value"}  # what GPT-NeoX, BLOOM and Falcon call a layer with the three of each head side by side


@dataclass(frozen=True, kw_only=True)
class IA3(TargetedMethod):
    """Rescaling of keys, values and feedforward activations.

    Raises:
        NotApplicableError: no target is named, and the model has no attention.
        TargetError: a layer of feedforward_modules is not among the targets.
    """

    peft: ClassVar[PeftTable | None] = PeftTable(type="IA3")

    target_modules: Patterns = None
    """Layers to rescale; None for key, value and ffn-output. Of a layer that holds query, key and value in one, None
    rescales keys and values, its name all three."""
    feedforward_modules: Patterns = None
    """Those of the layers whose input is rescaled, not their output; None for ffn-output where target_modules is None
    too, else for none."""

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        hosts = [h for h in find_hosts(model) if not within(h.name, fully_trained)]
        roles = find_roles(hosts)
        feedforward, queries = self.feedforward_modules, {}
        if self.target_modules is not None:
            chosen = select_hosts(model, self.target_modules, self.exclude_modules, self.layers, fully_trained)
        else:
            if mixed := next((name for name in roles["fused"] if leaf(name) in _BY_HEAD), None):
                raise NotApplicableError(
                    f"IA3 cannot tell keys and values in '{mixed}', which holds query, key and value head by head. "
                    f"Name it to rescale all three: target_modules=[{leaf(mixed)!r}, 'ffn-output']."
                )
            queries = _fused_queries(hosts, roles["fused"])
            # A fused layer stands for its keys and values: the rows of the queries are left out when it is built.
            wanted = roles["key"] | roles["value"] | roles["ffn-output"] | roles["fused"]
            if not roles["attention"]:
                raise NotApplicableError(
                    f"IA3 finds no attention in {type(model).__name__}. Name layers to rescale: target_modules=[...]."
                )
            vocabulary = Vocabulary([host.name for host in hosts], roles, model=model)
            left = vocabulary.narrow(wanted, self.exclude_modules, self.layers)
            chosen = [host for host in hosts if host.name in left]
            feedforward = sorted(roles["ffn-output"]) if feedforward is None else feedforward
        names = {host.name for host in chosen}
        choice = f"exclude_modules={self.exclude_modules!r} and layers={self.layers!r}"
        if not names:
            raise TargetError(f"IA3: {choice} leave no layer to rescale.")
        # Else it would be silently scaled at its output, or not at all.
        for pattern in each_pattern(self.feedforward_modules):
            if _named(model, pattern).isdisjoint(names):
                raise TargetError(
                    f"IA3: target_modules={self.target_modules!r}, {choice} leave {len(names)} layers, none of them "
                    f"one of feedforward_modules={pattern!r}: name it in target_modules too."
                )
        scaled_inputs = _named(model, feedforward)
        # What reads these writes into none. Kernels that rotate do, into queries and keys, and torch need not notice.
        kept = roles["value"] | (set() if has_rotary_positions(model) else roles["key"] | roles["fused"])
        return Plan(
            [
                Placement(
                    h.path, self._build(h, h.name in scaled_inputs, queries.get(h.name, 0), h.name in kept), h.part
                )
                for h in chosen
            ]
        )

    def pointed_at(self, paths: Sequence[str]) -> "IA3":
        return self  # the paths do not tell which of them are feedforward_modules

    def _build(self, host: Host, scales_input: bool, start: int, kept: bool) -> Adapter:
        if scales_input:
            if host.weight_only or isinstance(host.layout, EmbeddingLayout):
                raise NotApplicableError(
                    f"IA3 cannot rescale the input of '{host.name}': {type(host.module).__name__} has none of its own. "
                    "Take it out of feedforward_modules."
                )
            return IA3Input(host)
        return IA3Weight(host, start) if host.weight_only else IA3Output(host, start, kept)


def _fused_queries(hosts: Sequence[Host], fused: set[str]) -> dict[str, int]:
    """How many features of each layer that holds query, key and value are the query: as many as the output reads."""
    layouts = {host.name: host.layout for host in hosts}
    return {
        name: layouts[attention.output].in_features if attention.output else layouts[name].out_features // 3
        for block in find_blocks(hosts)
        for attention in block.attentions
        for name in attention.linears
        if name in fused
    }


def _named(model: nn.Module, patterns: list[str] | str | None) -> set[str]:
    """Names of the layers that ``feedforward_modules`` speaks of."""
    try:
        return {host.name for host in select_hosts(model, patterns)} if patterns else set()
    except TargetError as error:
        raise TargetError(f"feedforward_modules: {str(error).removeprefix('target_modules: ')}") from error


class _Scaling(Adapter):
    """What the three have in common: factors that change nothing where they are one."""

    ia3_l: nn.Parameter

    def combine(self, sources: Sequence["_Scaling"], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        self.ia3_l.copy_(1 + recipe.mix([source.ia3_l - 1 for source in sources]))


class IA3Output(_Scaling, OutputAdapter):
    """Rescales the features of the host's output from ``start`` on; ``kept`` if nothing writes into it afterwards."""

    saves_output = True

    def __init__(self, host: Host, start: int, kept: bool) -> None:
        super().__init__()
        self.in_place = host.owns_output and kept
        self.layout, self.start, self.bias = host.layout, start, host.bias
        self.ia3_l = _ones(host.layout.out_features - start, host.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale = _from(self.start, self.ia3_l).to(y.dtype)
        return y * self.layout.channels(scale)

    def forward_(self, x: Tensor, y: Tensor) -> Tensor:
        return scale_(y, self.ia3_l)

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = parameters["weight"]
        scale = _from(self.start, self.ia3_l).to(weight.dtype)
        merged = {"weight": self.layout.native(self.layout.matrix(weight) * scale[:, None])}
        return {**merged, "bias": parameters["bias"] * scale} if self.bias else merged


class IA3Weight(_Scaling, WeightAdapter):
    """Rescales rows of a weight, and entries of its bias, that the host reads itself."""

    def __init__(self, host: Host, start: int) -> None:
        super().__init__()
        self.names = (host.parameter, host.bias) if host.bias else (host.parameter,)
        self.layout, self.start, self.bias_start = host.layout, start, host.bias_start
        self.ia3_l = _ones(host.layout.out_features - start, host.weight)

    def forward(self, weight: Tensor, name: str) -> Tensor:
        scale = _from(self.start, self.ia3_l).to(weight.dtype)
        if name == self.names[0]:
            return self.layout.native(self.layout.matrix(weight) * scale[:, None])
        rest = weight.shape[0] - self.bias_start - scale.shape[0]
        return weight * F.pad(scale, (self.bias_start, rest), value=1.0)


class IA3Input(_Scaling, InputAdapter):
    """Rescales the features of the host's input."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.layout = host.layout
        features = host.module.in_channels if isinstance(host.layout, ConvLayout) else host.layout.in_features
        self.ia3_l = _ones(features, host.weight)  # type: ignore[arg-type]  # of a convolution

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_input(args, kwargs)
        return with_first_input(args, kwargs, x * self.layout.channels(self.ia3_l.to(x.dtype)))

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight, scale = parameters["weight"], self.ia3_l.to(parameters["weight"].dtype)
        if not isinstance(self.layout, ConvLayout):
            return {"weight": self.layout.native(self.layout.matrix(weight) * scale)}
        groups, channels = self.layout.groups, weight.shape[1]
        by_output = scale.view(groups, 1, channels).expand(-1, weight.shape[0] // groups, -1).reshape(-1, channels)
        return {"weight": weight * by_output.view(*by_output.shape, *[1] * len(self.layout.kernel))}


def _ones(features: int, weight: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.ones(features, device=weight.device, dtype=adapter_dtype(weight)))


def _from(start: int, scale: Tensor) -> Tensor:
    """``scale`` behind ``start`` ones."""
    return F.pad(scale, (start, 0), value=1.0) if start else scale
