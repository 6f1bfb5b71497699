"""Names of modules and tensors as a user knows them, whatever torch has wrapped around the modules since."""

from torch import nn

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})  # torch.compile, activation checkpointing


def is_wrapper(module: nn.Module) -> bool:
    """Whether torch has put ``module`` around another one."""
    return not _WRAPPERS.isdisjoint(module._modules)


def plain_name(name: str) -> str:
    """``"net._orig_mod.0.weight"`` without the parts that ``torch.compile`` and its like put in: ``"net.0.weight"``.

    Files hold plain names, so that what was trained compiled loads uncompiled, and the other way round.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
