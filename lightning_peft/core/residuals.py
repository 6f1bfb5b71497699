"""The residual sublayers of a transformer's blocks: where each reads the stream, where it ends, and which norm it has.

A post-LN block computes ``LN(x + h(x))``, a pre-LN block ``x + h(LN(x))``. Both may be built from modules of the same
names in the same order (BART and Whisper are), so the block itself is asked: the forward of a copy without weights is
started, and stopped at the first norm or linear layer that it calls.
"""

import copy
import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.core.blocks import PROJECTIONS, Block, find_blocks
from lightning_peft.core.hosts import Host, find_hosts
from lightning_peft.core.norms import find_norms


@dataclass(frozen=True)
class Sublayer:
    """One residual sublayer of a block; paths are those of modules, from the model."""

    kind: Literal["attention", "cross-attention", "ffn"]
    block: str
    source: str
    """The module whose first input is what the sublayer itself reads."""
    output: str
    """The module whose output is h, which is added to the residual stream."""
    width: int
    """Features of the residual stream."""
    norm: str = ""
    """The sublayer's norm; empty where it could not be told."""
    pre: bool | None = None
    """Whether the norm reads the stream before the sublayer (pre-LN) or after the sum (post-LN); None: unknown."""
    last: bool = False
    """Whether it is the block's last, so that the sum is the block's output."""


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """The sublayers of every block of ``model``, in their order."""
    hosts = {host.name: host for host in find_hosts(model)}
    norms = find_norms(model)
    found: list[Sublayer] = []
    for block in find_blocks(list(hosts.values())):
        path = block.path
        while isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
            path = path.rpartition(".")[0]  # T5 keeps a block's sublayers in a list: what runs is the module around it
        found += _sublayers(model, replace(block, path=path), hosts, norms)
    return found


def _sublayers(
    model: nn.Module, block: Block, hosts: dict[str, Host], norms: Sequence[tuple[str, nn.Module]]
) -> list[Sublayer]:
    found = [
        Sublayer(
            "cross-attention" if attention.cross else "attention",
            block.path,
            attention.path,
            hosts[attention.output].path,
            hosts[attention.output].layout.out_features,
        )
        for attention in block.attentions
        if attention.output
    ]
    if not found or not block.ffn:
        return found
    end = hosts[block.ffn[-1]]
    if end.layout.out_features != found[0].width:
        return found  # it puts out something else: in a mixture of experts, how much each counts
    found.append(Sublayer("ffn", block.path, hosts[block.ffn[0]].path, end.path, end.layout.out_features))
    inside = [hosts[name].path for name in (*block.ffn, *(n for a in block.attentions for n in a.linears))]
    own = _block_norms(block, norms, found[0].width, inside)
    pre = _starts_with_norm(model.get_submodule(block.path), own, inside, found[0].width, model, block.path)
    return [
        Sublayer(s.kind, s.block, s.source, output, s.width, norm, pre if norm else None, s is found[-1])
        for s, (norm, output) in zip(found, _pair(found, own, pre), strict=True)
    ]


def _block_norms(block: Block, norms: Sequence[tuple[str, nn.Module]], width: int, linears: Sequence[str]) -> list[str]:
    """The norms of a block's stream: not those of single heads, which sit beside the projections."""
    leaves = {leaf for names in PROJECTIONS.values() for leaf in names}
    projecting = {path.rpartition(".")[0] for path in linears if path.rpartition(".")[2] in leaves} - {block.path}
    return [
        path
        for path, norm in norms
        if (not block.path or path.startswith(f"{block.path}."))
        and norm.get_parameter("weight").numel() == width
        and path.rpartition(".")[0] not in projecting
    ]


def _pair(sublayers: Sequence[Sublayer], norms: Sequence[str], pre: bool | None) -> list[tuple[str, str]]:
    """The norm of each sublayer and the path of its output."""
    if len(norms) == len(sublayers):
        return [(norm, s.output) for norm, s in zip(norms, sublayers, strict=True)]
    if len(norms) == 2 * len(sublayers):  # one before and one after: the second one's output joins the stream
        return list(zip(norms[::2], norms[1::2], strict=True))
    if len(norms) == 1 and pre:  # attention and feedforward part read the same normalised stream
        return [(norms[0], s.output) for s in sublayers]
    return [("", s.output) for s in sublayers]


class _SeenError(Exception):
    """Ends the look at a block."""


def _starts_with_norm(
    block: nn.Module, norms: Sequence[str], linears: Sequence[str], width: int, model: nn.Module, path: str
) -> bool | None:
    """Whether the first thing that ``block`` calls is a norm; None if its forward cannot be started."""
    seen: list[bool] = []

    def stop(is_norm: bool) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen.append(is_norm)
            raise _SeenError

        return hook

    below = {name: name[len(path) + 1 :] if path else name for name in (*norms, *linears) if name != path}
    # Whatever else the block wants, it wants it later; and if not, it stays unknown.
    with torch.no_grad(), suppress(Exception):
        # A copy, so that no hook, generator, running mean or attribute of the model sees any of this.
        twin = copy.deepcopy(block, {id(t): _weightless(t) for t in (*model.parameters(), *model.buffers())}).eval()
        for module in twin.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        for name, inside in below.items():
            twin.get_submodule(inside).register_forward_pre_hook(stop(name in norms))
        weight = next(twin.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        stream = torch.zeros(1, 1, width, device="meta", dtype=dtype)
        required = [
            p
            for p in inspect.signature(twin.forward).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        twin.forward(stream, *[None] * (len(required) - 1))
    return seen[0] if seen else None


def _weightless(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
