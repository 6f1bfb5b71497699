"""The one place where packages that may be absent, or are too slow to import up front, are looked up."""

import sys
from typing import Any

from torch import nn


def hf_conv1d() -> type[nn.Module] | None:
    """The ``Conv1D`` class of transformers (GPT-2's linear layer), or None while transformers' code is not loaded.

    A model that contains one has loaded it, so nothing is imported here: ``import lightning_peft`` stays cheap.
    """
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def bitsandbytes_functions() -> Any:
    """The functions of bitsandbytes, or None while it is not loaded, as it is where a model has a weight of its."""
    return sys.modules.get("bitsandbytes.functional")


def hf_attention_functions() -> Any:
    """The table in which attentions of transformers look up their function, or None while it is not loaded."""
    return getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
