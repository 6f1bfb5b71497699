"""How the peft package has a method, as a table in the method's file.

What a table says is read and written by :mod:`lightning_peft.checkpoints.peft`. A method whose form in peft follows
from more than a table has a :class:`~lightning_peft.checkpoints.peft.formats.PeftFormat` of its own there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.network.layouts import Layout

Layouts = tuple[type[Layout], ...]


@dataclass(frozen=True, kw_only=True)
class PeftTable:
    """A method's part of peft's config and tensors."""

    type: str
    """The ``peft_type``."""
    marks: Mapping[str, Any] = field(default_factory=dict)
    """Fields of peft's config, with their values, that tell this method's files from others of the same type, such as
    ``{"use_dora": True}``. Of several methods that fit a file, the one with the most marks reads it."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Our fields, and what peft calls them."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Parameters and buffers of an adapter, and their keys below the layer in peft's files."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """The same of what a :class:`~lightning_peft.core.targeted.LayerMethod` shares, which peft keeps on its wrapper."""
    layouts: Layouts = (Layout,)
    """What peft adapts: linear layers, and perhaps transposed ones, convolutions and embeddings."""
    rank: tuple[str, ...] = ()
    """Keys whose first dimension is the layer's rank, where layers may have ranks and alphas of their own."""
    harmless: tuple[str, ...] = ()
    """Other fields of peft's config that say nothing of what the adapter computes."""
