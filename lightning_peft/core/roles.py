"""What each linear layer of a transformer does, found from where it sits.

Query, key and value are known by the handful of names the field gives to those three projections; everything else
follows from structure: an attention is the smallest module that holds the projections and one more linear layer (its
output); a block is the smallest module that holds an attention and linear layers outside of it (its feedforward part).
"""

from collections.abc import Sequence

from lightning_peft.core.hosts import Host

ROLES = ("attention", "query", "key", "value", "attention-output", "ffn", "ffn-output")

_PROJECTIONS = {
    "query": {"q", "query", "q_proj", "q_lin", "query_proj", "wq", "to_q"},
    "key": {"k", "key", "k_proj", "k_lin", "key_proj", "wk", "to_k"},
    "value": {"v", "value", "v_proj", "v_lin", "value_proj", "wv", "to_v"},
    "fused": {"in_proj", "c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv"},
}
# Projections of relative positions: part of an attention, and none of the three (DeBERTa with share_att_key=False).
_POSITIONS = {"pos_key_proj", "pos_query_proj"}


def find_roles(hosts: Sequence[Host]) -> dict[str, set[str]]:
    """Map each role of :data:`ROLES`, and ``"fused"`` (query, key and value in one), to the names of its hosts."""
    linears = [host.name for host in hosts if host.linear]
    found: dict[str, set[str]] = {role: set() for role in (*ROLES, "fused")}
    for name in linears:
        for role, leaves in _PROJECTIONS.items():
            if name.rpartition(".")[2] in leaves:
                found[role].add(name)
    positions = {name for name in linears if name.rpartition(".")[2] in _POSITIONS}
    projections = positions.union(*(found[role] for role in _PROJECTIONS))
    # A feature called "value" alone is no attention: a query beside it, or the three in one, is.
    anchors = found["fused"] | {
        q for q in found["query"] if _siblings(q, found["key"]) and _siblings(q, found["value"])
    }

    scopes = {_climb(_parent(name), linears, projections) for name in anchors}
    for scope in scopes:
        inside = [name for name in linears if _below(name, scope)]
        found["attention"].update(inside)
        found["attention-output"].update([name for name in inside if name not in projections][-1:])
    for role in _PROJECTIONS:
        found[role] &= found["attention"]
    for block in {_climb(_parent(scope), linears, found["attention"]) for scope in scopes if scope}:
        outside = [name for name in linears if _below(name, block) and name not in found["attention"]]
        found["ffn"].update(outside)
        found["ffn-output"].update(outside[-1:])
    return found


def _climb(start: str, names: list[str], known: set[str]) -> str:
    """The nearest module at or above ``start`` that holds one of ``names`` not yet ``known``, within the same stack."""
    path = start
    while not any(_below(name, path) and name not in known for name in names):
        if not path or (path.rpartition(".")[2].isdigit() and not _numbered(_parent(path))):
            return start  # the top, or out of the stack of blocks: what lies there belongs to the model
        path = _parent(path)
    return path


def _siblings(name: str, others: set[str]) -> bool:
    return any(_parent(name) == _parent(other) for other in others)


def _below(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _numbered(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
