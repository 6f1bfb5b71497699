"""What each linear layer of a transformer does, by the words that target patterns may use."""

from collections.abc import Sequence

from lightning_peft.core.blocks import PROJECTIONS, find_blocks
from lightning_peft.core.hosts import Host
from lightning_peft.core.walk import leaf

ROLES = ("attention", "query", "key", "value", "attention-output", "ffn", "ffn-output")


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
