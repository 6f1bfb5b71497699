"""Where a network turns positions into numbers: learned tables and rotary embeddings.

Virtual tokens before a text take its first positions, so the text moves on by as many; where positions are looked up
in a learned table, both together must fit into it.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import InputAdapter
from lightning_peft.core.slots import base_modules
from lightning_peft.errors import ConfigError


def position_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that are called with positions: embeddings named so, and whatever holds inverse frequencies."""
    return [(path, module) for path, module in base_modules(model) if _is_table(path, module) or _is_rotary(module)]


def has_rotary_positions(model: nn.Module) -> bool:
    """Whether ``model`` turns queries and keys by their positions."""
    return any(_is_rotary(module) for _, module in base_modules(model))


def positions_above(model: nn.Module, path: str) -> list[str]:
    """Paths of the modules that number the tokens for the block at ``path``.

    They are those of the nearest module around the block that has any, and none if no tokens are looked up there:
    patches of an image and frames of a recording have places of their own.
    """
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        if found := position_modules(owner):
            places = {id(module) for _, module in found}
            tokens = any(isinstance(m, nn.Embedding) and id(m) not in places for _, m in base_modules(owner))
            return [f"{path}.{name}" if path else name for name, _ in found] if tokens else []
    return []


def free_positions(module: nn.Module) -> int | None:
    """How many positions a learned table has; None for what is computed."""
    if not isinstance(module, nn.Embedding):
        return None
    # RoBERTa begins to count behind its padding entry, BART two entries in.
    offset = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
    return module.num_embeddings - int(offset)


def check_room(name: str, virtual: int, path: str, module: nn.Module) -> None:
    """Raise unless a position table has room for ``virtual`` tokens and at least one more.

    Raises:
        ConfigError: it has not.
    """
    free = free_positions(module)
    if free is not None and virtual >= free:
        raise ConfigError(
            f"{name}: {virtual} virtual tokens leave no room for a text, since the position table '{path}' has "
            f"{free} positions. Use fewer (num_virtual_tokens)."
        )


class PositionShift(InputAdapter):
    """Moves the tokens that a table or a rotary embedding is asked about on by ``amount`` positions."""

    def __init__(self, path: str, module: nn.Module, amount: int) -> None:
        super().__init__()
        self.path, self.amount = path, amount
        self.order = list(inspect.signature(module.forward).parameters)
        known = [name for name in ("position_ids", "past_key_values_length") if name in self.order]
        self.known = known or self.order[:1]
        self.rows = module.num_embeddings if isinstance(module, nn.Embedding) else None
        self.offset = int(getattr(module, "offset", 0))  # added by the module itself

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = {**dict(zip(self.order, args, strict=False)), **kwargs}
        name = next((name for name in self.known if call.get(name) is not None), self.known[-1])
        call[name] = call.get(name, 0) + self.amount
        self._check(call[name], call[self.order[0]])
        return (), call

    def _check(self, positions: Any, tokens: Any) -> None:
        """Raise if the table ends before ``positions``: each token's, or that of the first of a tensor or shape."""
        if self.rows is None or torch.compiler.is_compiling():
            return
        if isinstance(positions, Tensor) and positions.device.type != "cpu":  # reading one would wait for the device
            return
        if isinstance(positions, Tensor) and positions.dim():
            end = int(positions.max()) + 1
        else:
            end = int(positions) + (tokens.shape if isinstance(tokens, Tensor) else tokens)[1]
        if end + self.offset > self.rows:
            raise ConfigError(
                f"The text is too long beside {self.amount} virtual tokens: together they reach entry "
                f"{end + self.offset} of the position table '{self.path}', which has {self.rows}. Shorten the text, or "
                "use fewer (num_virtual_tokens)."
            )


def _is_table(path: str, module: nn.Module) -> bool:
    leaf = path.rpartition(".")[2]
    return isinstance(module, nn.Embedding) and ("pos" in leaf or leaf == "wpe")


def _is_rotary(module: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
