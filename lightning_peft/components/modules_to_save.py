"""The modules that train beside the adapters, all of them: a new task head, an embedding."""

from collections.abc import Iterator, Sequence

from torch import nn

from lightning_peft.components.tuned import Copies, FullyTrainedParameters
from lightning_peft.core.method import Placement
from lightning_peft.network.parameters import readers
from lightning_peft.network.pretrained import task_heads
from lightning_peft.network.targets import match_modules
from lightning_peft.network.walk import join


def resolve_modules_to_save(model: nn.Module, modules_to_save: list[str] | str | None) -> list[str]:
    """Paths of the modules to train whole.

    Raises:
        TargetError: a name matches no module that has parameters.
    """
    if modules_to_save is None:
        return []
    if modules_to_save == "auto":
        return task_heads(model)
    names = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save
    return match_modules(model, names, "modules_to_save")


def plan_modules_to_save(model: nn.Module, fully_trained: Sequence[str]) -> Iterator[Placement]:
    """One adapter for each module below ``fully_trained`` whose forward reads parameters of its own."""
    copies: Copies = {}
    for top in fully_trained:
        for below, module, _ in readers(model.get_submodule(top)):
            yield Placement(join(top, below), FullyTrainedParameters(module, copies=copies))
