"""The one place where packages that may be absent, or are too slow to import up front, are looked up."""

import sys
import warnings
from functools import cache
from typing import Any

from torch import nn

HF_NEWEST = "5.24.0"  # the newest release of transformers that the tests were run with


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


def hf_version() -> str:
    """The release of transformers that is loaded; "not loaded" where none is."""
    return str(getattr(sys.modules.get("transformers"), "__version__", "not loaded"))


@cache
def check_hf_version() -> None:
    """Warn, once in a process, if transformers is newer than any release that was run.

    For what rests on its insides: the arguments of a call, the table of attention functions, the parts of a cache.
    """
    from packaging.version import Version  # only here: `import lightning_peft` stays cheap

    found = hf_version()
    if found != "not loaded" and Version(found) > Version(HF_NEWEST):
        warnings.warn(
            "Prompts, prefixes and the rows of a cache rest on the insides of transformers. They were run with "
            f"releases up to {HF_NEWEST}, and this is {found}. What is not recognised is an error; to be sure, compare "
            f"a few outputs with and without use_cache, or install transformers=={HF_NEWEST}.",
            stacklevel=2,
        )
