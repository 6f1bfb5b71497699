"""What every kind of file shares on its way into a model: planning within bounds, and places as files name them.

A file is read and checked in itself, its base is compared, the adapters are planned (:func:`plan_stored`) and filled
while they are attached to nothing. Attaching comes last and cannot fail, so a refusal has nothing to undo.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_peft.checkpoints.guard import limit_allocation
from lightning_peft.components.tuned import FullyTrainedParameters
from lightning_peft.core.method import Method, Placement
from lightning_peft.injection.inject import Injection, plan_injection
from lightning_peft.injection.reads import ReadWeights
from lightning_peft.network.pretrained import pretrained_models
from lightning_peft.network.walk import below, plain_name


def plan_stored(model: nn.Module, method: Method, name: str, tensors: Iterable[Any]) -> Injection:
    """Plan the adapter that a file describes. The model is only read.

    Args:
        model: the network.
        method: the adapter's.
        name: what to call it here.
        tensors: everything that the file holds; its tensors bound how large the adapters may be.

    Raises:
        AdapterNameError: the name is taken, or cannot be a name.
        CheckpointError: the adapters would be larger than ``tensors``.
        PEFTError: the method does not fit the model.
    """
    with limit_allocation(model, tensors):
        return plan_injection(model, method, name)


def sole_network(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The one transformers model at or below ``model``, with its path; None if there is none, or several."""
    found = [(plain_name(path), network) for path, network in pretrained_models(model)]
    return found[0] if len(found) == 1 else None


def seen_from(root: str, placements: Iterable[Placement]) -> list[Placement]:
    """The ``placements`` by plain paths that begin below the module at ``root``."""
    return [replace(placement, path=below(plain_name(placement.path), root)) for placement in placements]


def places_of(placements: Iterable[Placement]) -> list[str]:
    """The places as files name them: ``path``, or ``path:part`` where an adapter has several on one host."""
    return [f"{placement.path}:{placement.part}" if placement.part else placement.path for placement in placements]


def differing_place(recorded: Iterable[str], placements: Sequence[Placement]) -> str:
    """A place that is not in both; empty if there is none. Parts without tensors are not compared.

    Where such a part acts (what moves positions, what cuts an output) may change from one release to the next.
    """
    empty = {placement.part for placement in placements if not placement.adapter.state_dict()} - {""}
    differing = {*recorded} ^ {*places_of(placements)}
    return min((place for place in differing if place.partition(":")[2] not in empty), default="")


def own_placements(placements: Iterable[Placement]) -> list[Placement]:
    """The method's own placements: no copies of modules that are fully trained (modules_to_save), and no readers."""
    others = FullyTrainedParameters, ReadWeights
    return [placement for placement in placements if not isinstance(placement.adapter, others)]
