"""Moving the tokens of a network on, where keys and values stand before them and take the first positions."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import InputAdapter
from lightning_peft.errors import ConfigError
from lightning_peft.network.calls import argument_names, bound, numbers_tokens
from lightning_peft.network.positions import beside_towers, free_positions
from lightning_peft.network.walk import join
from lightning_peft.prompting.call import position_argument, with_shifted_positions


def shift(path: str, module: nn.Module, amount: int) -> InputAdapter:
    """What moves the tokens that the module at ``path`` numbers, or is asked about, on by ``amount`` positions."""
    return StackShift(path, module, amount) if numbers_tokens(module) else PositionShift(path, module, amount)


class StackShift(InputAdapter):
    """Numbers the tokens that a stack of blocks reads from ``amount`` on, in its argument for positions."""

    def __init__(self, path: str, module: nn.Module, amount: int) -> None:
        super().__init__()
        self.path, self.amount, self.names = path, amount, argument_names(module)
        ends = [(free, name) for name, table in beside_towers(module) if (free := free_positions(table)) is not None]
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
