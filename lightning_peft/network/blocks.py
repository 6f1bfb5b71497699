"""The blocks of a transformer, found from where its linear layers sit.

Query, key and value are known by the handful of names the field gives to those three projections; everything else
follows from structure: an attention is the smallest module that holds the projections and one more linear layer (its
output); a block is the smallest module that holds an attention and linear layers outside of it (its feedforward part).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_peft.network.hosts import Host
from lightning_peft.network.walk import leaf, parent, within

ROLES = ("attention", "query", "key", "value", "attention-output", "ffn", "ffn-output")
"""What a linear layer of a transformer does, by the words that target patterns may use."""
PROJECTIONS = {
    "query": {"q", "query", "q_proj", "q_lin", "query_proj", "wq", "to_q"},
    "key": {"k", "key", "k_proj", "k_lin", "key_proj", "wk", "to_k"},
    "value": {"v", "value", "v_proj", "v_lin", "value_proj", "wv", "to_v"},
    "fused": {"in_proj", "c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv"},
}
# Part of an attention, and neither one of the three nor the output: projections of relative positions (DeBERTa with
# share_att_key=False), and of tokens that attend to all others (Longformer).
_FURTHER = {"pos_key_proj", "pos_query_proj", "query_global", "key_global", "value_global"}
# Names of the output. Elsewhere it is the last layer, and gates or relative positions may come behind one of these.
_OUTPUTS = {"o", "o_proj", "out_proj", "out_lin", "c_proj", "dense", "proj", "wo", "Wo", "to_out"}


@dataclass(frozen=True)
class Attention:
    """One attention: the names of its linear layers, in the order of the model."""

    path: str
    """Path of the smallest module that holds all of them."""
    linears: tuple[str, ...]
    output: str
    """The layer that reads the heads' output; empty where there is none."""
    cross: bool
    """True if it attends to another sequence: it is not the first of its block."""


@dataclass(frozen=True)
class Block:
    """One block: its attentions, and the names of its feedforward layers."""

    path: str
    attentions: tuple[Attention, ...]
    ffn: tuple[str, ...]


def find_blocks(hosts: Sequence[Host]) -> list[Block]:
    """Find the blocks among ``hosts``, in the order of the model. An attention outside of any is a block by itself."""
    linears = [host.name for host in hosts if host.linear]
    leaves = _FURTHER.union(*PROJECTIONS.values())
    projections = {name for name in linears if leaf(name) in leaves}
    named = {role: {name for name in linears if leaf(name) in names} for role, names in PROJECTIONS.items()}
    # A feature called "value" alone is no attention: a query beside it, or the three in one, is.
    complete = {parent(name) for name in named["key"]} & {parent(name) for name in named["value"]}
    anchors = named["fused"] | {name for name in named["query"] if parent(name) in complete}
    # An attention ends where its output is found; some have it one module further out.
    scopes = dict.fromkeys(_climb(parent(name), linears, projections) for name in linears if name in anchors)
    inside = {scope: tuple(name for name in linears if within(name, [scope])) for scope in scopes}
    attended = {name for names in inside.values() for name in names}
    owners = {scope: _climb(parent(scope), linears, attended) if scope else scope for scope in scopes}
    blocks = []
    for path in dict.fromkeys(owners.values()):
        own = [scope for scope, owner in owners.items() if owner == path]
        attentions = tuple(
            Attention(scope, inside[scope], _output(inside[scope], projections), cross=i > 0)
            for i, scope in enumerate(own)
        )
        outside = tuple(name for name in linears if within(name, [path]) and name not in attended)
        blocks.append(Block(path, attentions, outside if any(own) else ()))
    return blocks


def find_roles(hosts: Sequence[Host]) -> dict[str, set[str]]:
    """Map each role of :data:`ROLES`, and ``"fused"`` (query, key and value in one), to the names of its hosts."""
    found: dict[str, set[str]] = {role: set() for role in (*ROLES, "fused")}
    for block in find_blocks(hosts):
        for attention in block.attentions:
            found["attention"].update(attention.linears)
            found["attention-output"].update(name for name in [attention.output] if name)
        found["ffn"].update(block.ffn)
        found["ffn-output"].update(block.ffn[-1:])
    for role, leaves in PROJECTIONS.items():
        found[role] = {name for name in found["attention"] if leaf(name) in leaves}
    return found


def _output(linears: Sequence[str], projections: set[str]) -> str:
    others = [name for name in linears if name not in projections]
    return ([name for name in others if leaf(name) in _OUTPUTS] or others or [""])[-1]


def _climb(start: str, names: list[str], known: set[str]) -> str:
    """The nearest module at or above ``start`` that holds one of ``names`` not yet ``known``, within the same stack."""
    path = start
    while not any(within(name, [path]) and name not in known for name in names):
        if not path or (leaf(path).isdigit() and not _numbered(parent(path))):
            return start  # the top, or out of the stack of blocks: what lies there belongs to the model
        path = parent(path)
    return path


def _numbered(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))
