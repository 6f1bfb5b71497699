"""Where a network turns positions into numbers: learned tables, rotary and sine embeddings, whatever reads positions.

Virtual tokens before a text take its first positions, so the text moves on by as many; where positions are looked up
in a table that ends, both together must fit into it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import InputAdapter
from lightning_peft.core.model_call import (
    argument_names,
    bound,
    numbers_tokens,
    position_argument,
    takes_positions,
    with_shifted_positions,
)
from lightning_peft.core.walk import base_modules, join, leaf, parent, within
from lightning_peft.errors import ConfigError


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
    """How many positions a table has; None for what is computed."""
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
    tables = [("", module)] if isinstance(module, nn.Embedding) else _beside_towers(module)
    for below, table in tables:
        free = free_positions(table)
        if free is not None and virtual >= free:
            raise ConfigError(
                f"{name}: {virtual} virtual tokens leave no room for a text, since the position table "
                f"'{join(path, below)}' has {free} positions. Use fewer (num_virtual_tokens)."
            )


def shift(path: str, module: nn.Module, amount: int) -> InputAdapter:
    """What moves the tokens that the module at ``path`` numbers, or is asked about, on by ``amount`` positions."""
    return StackShift(path, module, amount) if numbers_tokens(module) else PositionShift(path, module, amount)


class StackShift(InputAdapter):
    """Numbers the tokens that a stack of blocks reads from ``amount`` on, in its argument for positions."""

    def __init__(self, path: str, module: nn.Module, amount: int) -> None:
        super().__init__()
        self.path, self.amount, self.names = path, amount, argument_names(module)
        ends = [(free, name) for name, table in _beside_towers(module) if (free := free_positions(table)) is not None]
        self.end = min(ends, default=None)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call, positions = with_shifted_positions(bound(self.names, args, kwargs), self.amount)
        if self.end is not None:
            _check_end(positions, self.end[0], join(self.path, self.end[1]), self.amount)
        return (), call


class PositionShift(InputAdapter):
    """Moves the tokens that a table or a rotary embedding is asked about on by ``amount`` positions."""

    def __init__(self, path: str, module: nn.Module, amount: int) -> None:
        super().__init__()
        self.path, self.amount = path, amount
        self.names = argument_names(module)
        self.rows = module.num_embeddings if isinstance(module, nn.Embedding) else None
        self.offset = int(getattr(module, "offset", 0))  # added by the module itself

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = bound(self.names, args, kwargs)
        name = position_argument(self.names, call, self.path)
        call[name] = call.get(name, 0) + self.amount
        if self.rows is not None:
            tokens = call[self.names[0]]
            new = 1 if isinstance(call[name], Tensor) and call[name].dim() else _width(tokens)
            _check_end(call[name] + self.offset + new - 1, self.rows, self.path, self.amount)
        return (), call


def _width(tokens: Any) -> int:
    """How many tokens a row has, of a tensor (batch, tokens) or of its shape."""
    return int((tokens.shape if isinstance(tokens, Tensor) else tokens)[1])


def _check_end(positions: Any, rows: int, path: str, amount: int) -> None:
    """Raise if a table of ``rows`` ends before ``positions``."""
    if torch.compiler.is_compiling():
        return
    if isinstance(positions, Tensor) and positions.device.type != "cpu":  # reading one would wait for the device
        return
    last = int(positions.max()) if isinstance(positions, Tensor) else int(positions)
    if last >= rows:
        raise ConfigError(
            f"The text is too long beside {amount} virtual tokens: together they reach entry {last + 1} of the "
            f"position table '{path}', which has {rows}. Shorten the text, or use fewer (num_virtual_tokens)."
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


def _beside_towers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The position modules in ``module`` but for those of its towers, which may be for an image beside its text."""
    towers = _towers(module)
    return [(name, m) for name, m in position_modules(module) if name.partition(".")[0] not in towers]
