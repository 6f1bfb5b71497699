"""Modules that are trained whole beside the adapters: a task head, a norm, an embedding.

Their trainable copies are adapters too, so the base keeps its own values, and disabling, switching and removing work
as they do everywhere else.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from lightning_peft.core.adapter import WeightAdapter, adapter_dtype
from lightning_peft.core.heads import task_heads
from lightning_peft.core.hosts import read_parameters
from lightning_peft.core.method import Placement
from lightning_peft.core.slots import base_modules
from lightning_peft.core.targets import match_modules


class SavedParameters(WeightAdapter):
    """A trainable copy of the parameters (and buffers) of one module, read in place of its own."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.names = read_parameters(host)
        self._places: dict[str, str] = {}
        for path in self.names:
            own = path.replace(".", "_")  # "out_proj.weight" cannot be the name of a parameter
            self._places[path] = own
            owner = host.get_submodule(path.rpartition(".")[0])
            tensor: Tensor = getattr(owner, path.rpartition(".")[2])
            if path.rpartition(".")[2] in owner._parameters:
                self.register_parameter(own, nn.Parameter(tensor.detach().to(adapter_dtype(tensor), copy=True)))
            else:
                self.register_buffer(own, tensor.detach().clone())

    def forward(self, weight: Tensor, name: str) -> Tensor:
        own: Tensor = getattr(self, self._places[name])
        return own.to(weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SavedParameters":
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        # Buffers follow every cast: the host updates them in place, so it must get the very tensors in its own dtype.
        self._buffers.update({name: fn(buffer) for name, buffer in buffers.items()})
        return self


def resolve_saved(model: nn.Module, modules_to_save: list[str] | str | None) -> list[str]:
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


def plan_saved(model: nn.Module, saved: Sequence[str]) -> Iterator[Placement]:
    """One adapter for each module below ``saved`` whose forward reads parameters of its own."""
    for top in saved:
        claimed: set[int] = set()
        for below, module in base_modules(model.get_submodule(top)):
            if id(module) in claimed:
                continue
            names = read_parameters(module)
            claimed.update(id(module.get_submodule(name.rpartition(".")[0])) for name in names if "." in name)
            if names:
                yield Placement(f"{top}.{below}" if below else top, SavedParameters(module))
