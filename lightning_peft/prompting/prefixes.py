"""Where the prefix of an attention goes: its host, and the adapters that put it before the host's own keys."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_peft.components.gate import Gate, InputGate
from lightning_peft.core.adapter import Reference
from lightning_peft.core.method import Placement
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.blocks import PROJECTIONS, Attention
from lightning_peft.network.calls import batch_dim
from lightning_peft.network.hosts import Host
from lightning_peft.network.patterns import layer_index
from lightning_peft.network.walk import base_modules, join, leaf
from lightning_peft.prompting.attention import PrefixedAttention, check_implementation, routes_attention
from lightning_peft.prompting.multihead import PrefixedMultihead


def attention_host(model: nn.Module, attention: Attention, hosts: dict[str, Host]) -> tuple[str, int]:
    """The module that computes an attention, and the features of its keys (and values).

    Raises:
        NotApplicableError: it computes its scores in a way of its own.
    """
    scope = model.get_submodule(attention.path)
    if isinstance(scope, nn.MultiheadAttention):
        return attention.path, scope.embed_dim
    routed = [name for name, module in base_modules(scope) if routes_attention(module)]
    sizes = {
        role: hosts[name].layout.out_features
        for name in attention.linears
        for role, leaves in PROJECTIONS.items()
        if leaf(name) in leaves
    }
    fused = sizes.get("fused", 0)
    queries = hosts[attention.output].layout.in_features if attention.output else fused // 3
    keys = sizes.get("key", (fused - queries) // 2)  # what the output reads is as wide as the queries
    if not routed or keys != sizes.get("value", keys) or keys < 1:
        raise NotApplicableError(
            f"PrefixTuning cannot put keys and values into '{attention.path}' ({type(scope).__name__}): it computes "
            "its scores in a way of its own. It needs nn.MultiheadAttention, or an attention of transformers that goes "
            "through AttentionInterface. Use LoRA or BottleneckAdapter there."
        )
    path = join(attention.path, routed[0])
    check_implementation(model.get_submodule(path))
    return path, keys


def place_prefix(
    prefix: Any, model: nn.Module, path: str, cross: bool, gate_features: int | None = None
) -> Iterator[Placement]:
    """Yield the adapters that put ``prefix`` before the keys and values of the attention at ``path``.

    Args:
        prefix: a module; called with the attention's first input, gives keys and values, each (P, features) or
            (batch, P, features).
        model: the network.
        path: of the attention.
        cross: whether it attends to another sequence.
        gate_features: of the attention's input, for the gate that is put into ``prefix.gate``; None for no gate.
    """
    host = model.get_submodule(path)
    if gate_features is not None:
        gate = InputGate(Gate(gate_features, next(prefix.parameters())), batch_dim(host))
        prefix.gate = Reference(gate)  # it has its own place among the adapters of the host
        yield Placement(path, gate, "gate")
    if isinstance(host, nn.MultiheadAttention):
        yield Placement(path, PrefixedMultihead(prefix))
    else:
        yield Placement(path, PrefixedAttention(prefix, host, None if cross else _relative(model, path)))


def _relative(model: nn.Module, path: str) -> nn.Module | None:
    """What turns relative positions into a bias for an attention: in itself, as in UMT5, or in its stack, as in T5."""
    stack = layer_index(path)
    for scope in (path, stack[0] if stack else path):
        for module in model.get_submodule(scope).modules():
            if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias"):
                return module
    return None
