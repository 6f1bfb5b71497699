"""The residual sublayers of a transformer's blocks: where each reads the stream, where it ends, and which norm it has.

A post-LN block computes ``LN(x + h(x))``, a pre-LN block ``x + h(LN(x))``. Both may be built from modules of the same
names in the same order (BART and Whisper are), so the block itself is asked: a copy of it without weights runs, and the
order in which it calls its norms and linear layers decides. Where it cannot run to its end, its first call does.
"""

import copy
import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.network.blocks import PROJECTIONS, Block, find_blocks
from lightning_peft.network.calls import first_input, first_output
from lightning_peft.network.hosts import Host, find_hosts
from lightning_peft.network.norms import find_norms
from lightning_peft.network.quantized.weights import is_quantized
from lightning_peft.network.walk import below, leaf, parent, within


@dataclass(frozen=True)
class Sublayer:
    """One residual sublayer of a block; paths are module paths, from the model."""

    kind: Literal["attention", "cross-attention", "ffn"]
    block: str
    source: str
    """The module whose first input is what the sublayer itself reads."""
    output: str
    """The module whose output is h, which is added to the residual stream."""
    width: int
    """Features of the residual stream."""
    norm: str = ""
    """The sublayer's norm; empty where it has none at its start or behind the sum, or where that could not be told."""
    pre: bool | None = None
    """True if the sublayer, through its norm if it has one, reads the stream (pre-LN); False if its norm reads the sum
    (post-LN); None if unknown."""
    last: bool = False
    """True if it is the block's last, so that the sum is the block's output."""


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """The sublayers of every block of ``model``, in their order."""
    hosts = {host.name: host for host in find_hosts(model)}
    norms = find_norms(model)
    # What copies have in place of the model's tensors.
    weightless = {id(t): _weightless(t) for t in (*model.parameters(), *model.buffers())}
    found: list[Sublayer] = []
    for block in find_blocks(list(hosts.values())):
        path = block.path
        while isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
            path = parent(path)  # T5 keeps a block's sublayers in a list: what runs is the module around it
        found += _sublayers(model, replace(block, path=path), hosts, norms, weightless)
    return found


def _sublayers(
    model: nn.Module,
    block: Block,
    hosts: dict[str, Host],
    norms: Sequence[tuple[str, nn.Module]],
    weightless: dict[int, Any],
) -> list[Sublayer]:
    found: dict[Sublayer, set[str]] = {}  # and the linear layers of each
    for attention in block.attentions:
        if attention.output:
            end = hosts[attention.output]
            kind: Literal["attention", "cross-attention"] = "cross-attention" if attention.cross else "attention"
            sublayer = Sublayer(kind, block.path, attention.path, end.path, end.layout.out_features)
            found[sublayer] = {hosts[name].path for name in attention.linears}
    if not found or not block.ffn:
        return list(found)
    end, width = hosts[block.ffn[-1]], next(iter(found)).width
    if end.layout.out_features != width:
        return list(found)  # it puts out something else: in a mixture of experts, how much each counts
    sublayer = Sublayer("ffn", block.path, hosts[block.ffn[0]].path, end.path, width)
    found[sublayer] = {hosts[name].path for name in block.ffn}
    inside = set().union(*found.values())
    own = [path for path, norm in norms if within(path, [block.path]) and norm.get_parameter("weight").numel() == width]
    trace = BlockTrace(block.path, [*own, *inside])
    trace.run(model.get_submodule(block.path), width, any(s.kind == "cross-attention" for s in found), weightless)
    return (trace.finished and _by_calls(found, own, trace)) or _by_definition(list(found), own, inside, trace)


def _by_calls(found: dict[Sublayer, set[str]], norms: Sequence[str], trace: "BlockTrace") -> list[Sublayer]:
    """The sublayers in the order of their calls, each with its norm; empty if they do not come one after the other."""
    spans = {}
    for sublayer, linears in found.items():
        at = [i for i, name in enumerate(trace.calls) if name in linears]
        if not at:
            return []
        spans[sublayer] = min(at), max(at)
    order = sorted(spans, key=lambda s: spans[s])
    edges = [-1, *(edge for s in order for edge in spans[s]), len(trace.calls)]
    if any(a > b for a, b in pairwise(edges)):
        return []
    # The norms before, between and behind the sublayers; norms inside of one normalise queries and the like.
    gaps = [[n for n in trace.calls[a + 1 : b] if n in norms] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    # How many norms stand before, between and behind tells the kind of block.
    sizes = [len(gap) for gap in gaps]
    between = set(sizes[1:-1])
    told: list[tuple[str, str, bool | None]]
    if sizes == [len(order), *[0] * len(order)]:  # all before the first: parallel
        told = [(norm, s.output, True) for norm, s in zip(gaps[0], order, strict=True)]
    elif (sizes[0], sizes[-1]) == (1, 1) and between == {2}:  # before and after: the latter's output joins the stream
        told = [(a[-1], b[0], True) for a, b in pairwise(gaps)]
    elif (sizes[0], sizes[-1]) == (0, 1) and between <= {1}:
        told = [
            ("", gap[0], True) if trace.reads(gap[0], s.output) else (gap[0], s.output, False)
            for s, gap in zip(order, gaps[1:], strict=True)
        ]
    elif sizes[-1] == 0 and max(sizes) == 1:
        told = []
        for s, gap in zip(order, gaps[:-1], strict=True):
            shared = told[-1][0] if told and any(trace.reads(name, told[-1][0]) for name in found[s]) else ""
            told.append((gap[0] if gap else shared, s.output, True))
    else:
        told = [("", s.output, None) for s in order]
    return [
        replace(s, output=output, norm=norm, pre=pre, last=s is order[-1])
        for s, (norm, output, pre) in zip(order, told, strict=True)
    ]


def _by_definition(
    found: Sequence[Sublayer], norms: Sequence[str], inside: set[str], trace: "BlockTrace"
) -> list[Sublayer]:
    """The sublayers with the norms in the order in which the block defines both."""
    leaves = set().union(*PROJECTIONS.values())
    # The norms of single heads sit beside the projections.
    projecting = {parent(path) for path in inside if leaf(path) in leaves} - {found[0].block}
    norms = [path for path in norms if parent(path) not in projecting]
    pre = trace.calls[0] in norms if trace.calls else None
    pairs = [("", s.output) for s in found]
    if len(norms) == len(found):
        pairs = [(norm, s.output) for norm, s in zip(norms, found, strict=True)]
    elif len(norms) == 2 * len(found):  # one before and one after: the second one's output joins the stream
        pairs = list(zip(norms[::2], norms[1::2], strict=True))
    elif len(norms) == 1 and pre:  # attention and feedforward part read the same normalised stream
        pairs = [(norms[0], s.output) for s in found]
    return [
        replace(s, output=output, norm=norm, pre=pre if norm else None, last=s is found[-1])
        for s, (norm, output) in zip(found, pairs, strict=True)
    ]


class BlockTrace:
    """Which of some modules a block calls, in which order, and what they hand to each other."""

    def __init__(self, path: str, names: Sequence[str]) -> None:
        self.names = {name: below(name, path) for name in names if name != path}
        self.calls: list[str] = []
        self.finished = False
        self._entered: dict[str, tuple[Any, int]] = {}
        self._left: dict[str, tuple[Any, int]] = {}

    @torch.no_grad()
    def run(self, block: nn.Module, width: int, cross: bool, weightless: dict[int, Any]) -> None:
        """Run a copy of ``block`` that has no weights and no hooks, as far as it goes."""
        # Whatever else the block wants, it wants it later; and if not, what it would have done stays unknown.
        with suppress(Exception):
            twin = copy.deepcopy(block, dict(weightless)).eval()
            # Hooks were copied too, and a user's may keep the tensors that they see.
            for module in twin.modules():
                module._forward_pre_hooks.clear()
                module._forward_hooks.clear()
            for name, inner in self.names.items():
                twin.get_submodule(inner).register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
                twin.get_submodule(inner).register_forward_hook(partial(self._leave, name))
            weight = next(twin.parameters())
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            stream = torch.empty(1, 2, width, device="meta", dtype=dtype)
            one = torch.empty(1, 1, 1, device="meta", dtype=dtype)
            known: dict[str, Any] = {"position_embeddings": (one, one)}
            known |= {"encoder_hidden_states": stream, "memory": stream} if cross else {}
            _, *others = inspect.signature(block.forward).parameters.values()
            required = [p for p in others if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            given = {p.name: None for p in required} | {p.name: known[p.name] for p in others if p.name in known}
            twin.forward(stream, **given)
            self.finished = True

    def reads(self, name: str, other: str) -> bool:
        """True if what entered ``name`` is what ``other`` put out, unchanged."""
        (entered, now), (left, then) = self._entered.get(name, (None, 0)), self._left.get(other, (None, 0))
        if not (isinstance(entered, Tensor) and isinstance(left, Tensor)):
            return False
        return entered.untyped_storage()._cdata == left.untyped_storage()._cdata and now == then

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls.append(name)
        self._entered[name] = _versioned(first_input(args, kwargs))

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._left[name] = _versioned(first_output(output))


def _versioned(value: Any) -> tuple[Any, int]:
    """``value``, and how often it has been written into so far if it is a tensor."""
    return value, getattr(value, "_version", 0)


def _weightless(tensor: Tensor) -> Any:
    if is_quantized(tensor):  # which need not know empty_like
        empty = torch.empty(tensor.shape, device="meta", dtype=tensor.dtype)
    else:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
