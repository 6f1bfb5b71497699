"""How peft has a method: from the table in the method's file, or from code that is registered for its class."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from lightning_peft.checkpoints.peft.state import PeftFile, PeftState, exact_names, exact_targets
from lightning_peft.checkpoints.tensors import TensorView
from lightning_peft.core.method import Method, Placement
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.core.targeted import SHARED
from lightning_peft.network.layouts import ConvLayout, TransposedLayout

_F = TypeVar("_F", bound="type[PeftFormat]")


class PeftFormat:
    """How peft has the adapters of one method. This one reads the method's table; others know more."""

    def __init__(self, method: type[Method], table: PeftTable) -> None:
        self.method, self.table = method, table

    @property
    def types(self) -> tuple[str, ...]:
        """Each ``peft_type`` whose files this method reads."""
        return (self.table.type,)

    def to_peft(self, method: Any, placements: Sequence[Placement], model: Any) -> PeftState | None:
        """Say how peft has an adapter.

        Args:
            method: the adapter's.
            placements: the adapters, with their places in ``model``; without the modules that are fully trained, which
                are no matter of the method.
            model: the network that peft would wrap.

        Returns:
            None where peft could not compute the same.
        """
        tensors: dict[str, TensorView] = {}
        layers = [placement for placement in placements if placement.part != SHARED]
        for shared in (placement.adapter for placement in placements if placement.part == SHARED):
            held = shared.state_dict(keep_vars=True)
            own = {f":{key}": held[name] for name, key in self.table.shared.items() if name in held}
            tensors |= {key: TensorView((tensor,), trained=False) for key, tensor in own.items()}
        for placement in layers:
            named = self.tensors_of(placement.adapter)
            if placement.part or not named:  # peft adapts layers whose weight is called "weight", and no others
                return None
            tensors |= {f"{placement.path}.{key}": view for key, view in named.items()}
        config = {
            "peft_type": self.table.type,
            **self.config(method, layers),
            "target_modules": exact_targets([placement.path for placement in layers], model),
            **self._orientation(layers),
            **self.table.marks,
        }
        return PeftState(config=config, tensors=tensors)

    def tensors_of(self, adapter: Any) -> Mapping[str, TensorView] | None:
        """The tensors of one adapter by peft's keys below the layer; None where peft would compute something else."""
        named = adapter.peft_tensors()
        if named is None:
            layout = adapter.layout
            own_padding = isinstance(layout, ConvLayout) and layout.padding_mode != "zeros"  # which peft forgets
            if type(layout) not in self.table.layouts or own_padding:
                return None
            named = {key: getattr(adapter, own) for own, key in self.table.tensors.items()}
        return {key: TensorView((tensor.detach(),)) for key, tensor in named.items()}

    def _orientation(self, placements: Sequence[Placement]) -> dict[str, bool]:
        if TransposedLayout not in self.table.layouts:
            return {}
        layouts = [type(getattr(placement.adapter, "layout", None)) for placement in placements]
        return {"fan_in_fan_out": TransposedLayout in layouts}

    def config(self, method: Any, placements: Sequence[Placement]) -> dict[str, Any]:
        """The fields of peft's config that say what the adapters compute."""
        return {peft: getattr(method, own) for own, peft in self.table.fields.items()}

    def from_peft(self, file: PeftFile) -> tuple[Method, Mapping[str, Tensor]]:
        """Read a file of one of the :attr:`types`.

        Returns:
            The method, with the layers named one by one and no module fully trained, and the tensors as
            :meth:`to_peft` of that method would have them.

        Raises:
            CheckpointError: the file is damaged, or asks for something that is not to be had here.
        """
        table = self.table
        file.check_fields(*table.fields.values(), *table.marks, *table.harmless)
        names = exact_names(file.hosts(*table.tensors.values(), *table.rank), file.model)
        method: Any = self.method
        return method(**self.fields(file), target_modules=names, modules_to_save=None), file.tensors

    def fields(self, file: PeftFile) -> dict[str, Any]:
        """The values of our fields that a file's config says; what it leaves out has peft's default, which is ours."""
        return {own: file.config[peft] for own, peft in self.table.fields.items() if peft in file.config}


_FORMATS: dict[type[Method], type[PeftFormat]] = {}


def formats(method: Any) -> Any:
    """Register a :class:`PeftFormat` for a class of methods and its subclasses."""

    def register(form: _F) -> _F:
        _FORMATS[method] = form
        return form

    return register


def format_of(method: type[Method]) -> PeftFormat | None:
    """How peft has adapters of this class; None where peft has no such method."""
    if method.peft is None:
        return None
    kinds = (_FORMATS[base] for base in method.__mro__ if base in _FORMATS)
    return next(kinds, PeftFormat)(method, method.peft)
