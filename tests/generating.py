"""Texts that go on from a cache, under the name that the installed transformers has for it."""

import inspect
from typing import Any

from torch import nn


def cache_name(model: nn.Module) -> str:
    """The argument and the output of ``model`` that is its cache: renamed in transformers 5.24."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def with_cache(model: nn.Module, output: Any) -> dict[str, Any]:
    """The cache that ``model`` has put out, as an argument for its next call."""
    return {cache_name(model): getattr(output, cache_name(model))}
