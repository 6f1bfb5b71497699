r"""Prefix tuning: learned keys and values before every attention's own.

Li and Liang, 2021, arXiv:2101.00190; without the MLP it is P-tuning v2, Liu et al., 2022, arXiv:2110.07602.

.. math:: softmax\left(\frac{Q\,[P_K; K]^T}{\sqrt d}\right) [P_V; V]

P_K and P_V are parameters, or come out of an MLP that all layers share up to its last layer:
:math:`[P_K; P_V]_l = W_l \tanh(W E + b) + b_l`. They get no position themselves; the text's positions begin behind them
where positions are absolute or rotary, as in the reference implementation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, Reference, adapter_dtype
from lightning_peft.core.fields import Count, Layers, Must, NotNegative, Patterns
from lightning_peft.core.method import Method, Placement, Plan
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.errors import NotApplicableError, TargetError
from lightning_peft.network.blocks import Attention, Block, find_blocks
from lightning_peft.network.hosts import find_hosts
from lightning_peft.network.patterns import Vocabulary
from lightning_peft.network.positions import check_room, positions_above
from lightning_peft.network.pretrained import pretrained_models
from lightning_peft.network.walk import within
from lightning_peft.prompting.prefixes import attention_host, place_prefix
from lightning_peft.prompting.shift import shift

_PLACES = ("encoder", "decoder", "cross")
_Places = Annotated[
    list[str],
    Must(f"a list of any of {', '.join(_PLACES)}", lambda v: len(v) > 0 and all(place in _PLACES for place in v)),
]


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Learned keys and values before the own ones of a transformer's attentions.

    Raises:
        ConfigError: a field is out of range, or the prefix leaves no room in the model's position table.
        NotApplicableError: the model has no attention, or one that computes its scores in a way of its own.
    """

    exclusive: ClassVar[str] = "prefix"
    peft: ClassVar[PeftTable | None] = PeftTable(type="PREFIX_TUNING")

    num_virtual_tokens: Count = 20
    """Keys and values of the prefix in each attention."""
    prefix_projection: bool = False
    """True if the prefix comes out of an MLP, which may train better; else keys and values are parameters."""
    encoder_hidden_size: Count = 512
    """Hidden features of that MLP."""
    init_std: NotNegative = 0.02
    """Standard deviation of keys and values at the start (of the MLP's input: 1)."""
    places: _Places = field(default_factory=lambda: list(_PLACES))
    """Of an encoder-decoder model, which attentions: any of "encoder", "decoder" (to itself), "cross" (to the encoder).
    peft knows "decoder" alone. Other models have one kind."""
    gating: bool = False
    """True if a gate from the attention's input, from 0 to 1, scales the prefix (UniPELT)."""
    exclude_modules: Patterns = None
    """Attentions to leave alone: name parts, or one regular expression."""
    layers: Layers = None
    """Indices of the blocks that get one, in the outermost numbered container; negative ones count from the end."""
    modules_to_save: Patterns = "auto"
    """Modules fully trained beside the prefix: name suffixes; "auto" finds the task head of a transformers model."""

    @property
    def starts_as_base(self) -> bool:
        return False  # even a zero key takes its share of the attention

    def ejected(self) -> "PrefixTuning":
        return replace(self, prefix_projection=False)

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        hosts = {host.name: host for host in find_hosts(model)}
        blocks = [block for block in find_blocks(list(hosts.values())) if any(a.linears for a in block.attentions)]
        if not blocks:
            raise NotApplicableError(
                f"PrefixTuning finds no attention in {type(model).__name__}: there are no query, key and value layers "
                "side by side. Use LoRA or BottleneckAdapter there."
            )
        chosen = {a.path: (b, a) for b, a in self.attentions(blocks) if not within(a.path, fully_trained)}
        every = Vocabulary(a.path for b in blocks for a in b.attentions)
        names = every.narrow(chosen, self.exclude_modules, self.layers)
        if not names:
            raise TargetError("PrefixTuning: exclude_modules, layers and places leave no attention.")
        # One shift for each module that numbers tokens, however many attentions read its numbers.
        placements: list[Placement] = []
        numbered: dict[str, None] = {}
        trunk: Trunk | None = None
        encodes = attends_across(blocks) and _encodes(model)
        for name in names:
            block, attention = chosen[name]
            path, features = attention_host(model, attention, hosts)
            like, width = next(model.get_submodule(path).parameters()), hosts[attention.linears[0]].layout.in_features
            # On the first attention: the hooks of the others run later, and an adapter has to lie somewhere.
            if self.prefix_projection and trunk is None:
                trunk = Trunk(self, width, like)
                placements.append(Placement(path, trunk, "mlp"))
            prefix = Prefix(self, features, like, trunk)
            placements += place_prefix(prefix, model, path, attention.cross, width if self.gating else None)
            # A cross-attention reads the encoder's tokens, which keep their numbers.
            if not attention.cross and not (encodes and len(block.attentions) == 1):
                numbered.update(dict.fromkeys(positions_above(model, block.path)))
        for path in numbered:
            module = model.get_submodule(path)
            check_room("PrefixTuning", self.num_virtual_tokens, path, module)
            placements.append(Placement(path, shift(path, module, self.num_virtual_tokens), "positions"))
        return Plan(placements)

    def attentions(self, blocks: Sequence[Block]) -> list[tuple[Block, Attention]]:
        """The attentions of :attr:`places`, with their blocks."""
        chosen = []
        for block in blocks:
            itself = "decoder" if any(attention.cross for attention in block.attentions) else "encoder"
            for attention in block.attentions:
                if not attends_across(blocks) or ("cross" if attention.cross else itself) in self.places:
                    chosen.append((block, attention))
        return chosen


class Prefix(nn.Module):
    """Keys and values of one attention: its input x -> two of (P, features), or (batch, P, features) behind a gate."""

    def __init__(self, method: PrefixTuning, features: int, like: Tensor, trunk: "Trunk | None") -> None:
        super().__init__()
        options: dict[str, Any] = {"device": like.device, "dtype": adapter_dtype(like)}
        self._trunk = Reference(trunk)  # it has its own place, and every layer uses it
        self.gate: Reference[Any] = Reference(None)
        if trunk is None:
            size = (method.num_virtual_tokens, features)
            self.keys, self.values = (nn.Parameter(torch.empty(size, **options)) for _ in "kv")
            for parameter in (self.keys, self.values):
                nn.init.normal_(parameter, std=method.init_std)
        else:
            self.up = nn.Linear(method.encoder_hidden_size, 2 * features, **options)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (P, features), without a gate."""
        trunk = self._trunk.module
        return (self.keys, self.values) if trunk is None else self.up(trunk()).chunk(2, -1)

    def eject(self) -> bool:
        """Keep keys and values, and drop the layer that they came out of; whether there was one."""
        if self._trunk.module is None:
            return False
        trained = self.up.weight.requires_grad
        self.keys, self.values = (nn.Parameter(x.detach().clone(), trained) for x in self.flat())
        del self.up
        self._trunk = Reference(None)
        return True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.flat()
        if self.gate.module is None:
            return keys, values
        gate = self.gate.module(x)  # (batch, 1, 1)
        return keys * gate, values * gate


class Trunk(Adapter):
    """What the layers' MLPs share: () -> (P, hidden)."""

    def __init__(self, method: PrefixTuning, width: int, like: Tensor) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": like.device, "dtype": adapter_dtype(like)}
        self.embedding = nn.Parameter(torch.randn(method.num_virtual_tokens, width, **options))
        self.down = nn.Linear(width, method.encoder_hidden_size, **options)

    def eject(self) -> bool:
        return True

    def forward(self) -> Tensor:
        hidden: Tensor = self.down(self.embedding)
        return hidden.tanh()


def attends_across(blocks: Sequence[Block]) -> bool:
    """True if blocks attend to another sequence, as a decoder's blocks do behind an encoder."""
    return any(attention.cross for block in blocks for attention in block.attentions)


def _encodes(model: nn.Module) -> bool:
    """True unless what crosses attends to an image beside the text, and no decoder to an encoder of it (BLIP-2)."""
    known = [pretrained.config.is_encoder_decoder for _, pretrained in pretrained_models(model)]
    return not known or any(known)
