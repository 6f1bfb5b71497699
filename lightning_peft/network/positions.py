"""Where a network turns positions into numbers: learned tables, rotary and sine embeddings, whatever reads positions.

Virtual tokens before a text take its first positions, so the text moves on by as many; where positions are looked up
in a table that ends, both together must fit into it.
"""

from torch import nn

from lightning_peft.errors import ConfigError
from lightning_peft.network.calls import numbers_tokens, takes_positions
from lightning_peft.network.walk import base_modules, join, leaf, parent, within


def position_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that are asked about positions: embeddings named so, and what computes an embedding of them."""
    return [(path, module) for path, module in base_modules(model) if _is_table(path, module) or _computes(module)]


def has_rotary_positions(model: nn.Module) -> bool:
    """True if ``model`` may turn queries and keys by their positions: something computes with positions in it."""
    return any(_computes(module) for _, module in base_modules(model))


def positions_above(model: nn.Module, path: str) -> list[str]:
    """Paths of the modules that number the tokens for the block at ``path``, each the host of a :func:`shift`.

    They belong to the nearest module around the block in which tokens are looked up: its learned tables, which end and
    so are moved one by one; else that module itself, if it numbers its tokens, whatever it and its layers make of the
    numbers; else what computes positions in it. Patches of an image and frames of a recording have places of their own.
    """
    block = path
    towers: list[str] = []  # of what was passed on the way out
    while path:
        inner, path = path, parent(path)
        owner = model.get_submodule(path)
        towers += [join(path, name) for name in _towers(owner) if join(path, name) != inner]
        modules = ((join(path, name), module) for name, module in base_modules(owner))
        own = {name: module for name, module in modules if not within(name, towers)}
        found = {name: module for name, module in own.items() if _is_table(name, module) or _computes(module)}
        counts = numbers_tokens(owner)
        # A list of blocks numbers nothing, and what stands in the block itself is asked from further out.
        if not counts and (isinstance(owner, nn.ModuleList) or all(within(name, [block]) for name in found)):
            continue
        beside = [name for name in own.keys() - found.keys() if not within(name, [inner])]
        if not any(isinstance(own[name], nn.Embedding) for name in beside):
            return []
        learned = any(isinstance(module, nn.Embedding) for module in found.values())
        return [path] if counts and not learned else list(found)
    return []


def free_positions(module: nn.Module) -> int | None:
    """How many positions a table has; None if positions are computed."""
    if not isinstance(module, nn.Embedding):
        table = module._buffers.get("embed_positions")  # GPT-J's and CodeGen's sines
        return None if table is None else len(table)
    # RoBERTa begins to count behind its padding entry, BART two entries in.
    offset = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
    return module.num_embeddings - int(offset)


def check_room(name: str, virtual: int, path: str, module: nn.Module) -> None:
    """Raise unless the position tables that are, or are in, a module have room for ``virtual`` tokens and one more.

    Raises:
        ConfigError: they have not.
    """
    tables = [("", module)] if isinstance(module, nn.Embedding) else beside_towers(module)
    for below, table in tables:
        free = free_positions(table)
        if free is not None and virtual >= free:
            raise ConfigError(
                f"{name}: {virtual} virtual tokens leave no room for a text, since the position table "
                f"'{join(path, below)}' has {free} positions. Use fewer (num_virtual_tokens)."
            )


def _is_table(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and ("pos" in leaf(path) or leaf(path) == "wpe")


def _computes(module: nn.Module) -> bool:
    """True for what makes an embedding out of positions: it is told them, and has no layer and no weight."""
    if any(name.endswith(("inv_freq", "embed_positions")) for name in module._buffers):  # rotary, GPT-J's sines
        return True
    return not module._modules and not module._parameters and takes_positions(module)


def _towers(owner: nn.Module) -> list[str]:
    """The children of ``owner`` that have blocks of their own, and so tokens, frames or patches of their own."""
    lists = ((name, m) for name, child in owner.named_children() for m in child.modules() if type(m) is nn.ModuleList)
    return list(dict.fromkeys(name for name, blocks in lists if any(block._modules for block in blocks)))


def beside_towers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The position modules in ``module`` outside of its towers, which may be for an image beside its text."""
    towers = _towers(module)
    return [(name, m) for name, m in position_modules(module) if name.partition(".")[0] not in towers]
