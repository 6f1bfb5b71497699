"""Parameters of the base that train: all of a module (a task head, an embedding), or chosen ones (biases, norms).

Their trainable copies are adapters too, so the base keeps its own values, and disabling, switching and removing work
as they do everywhere else.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from lightning_peft.core.adapter import WeightAdapter, adapter_dtype
from lightning_peft.core.recipes import Recipe
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.parameters import check_trainable, read_parameters
from lightning_peft.network.quantized.weights import is_quantized
from lightning_peft.network.walk import leaf, parent

Copies = dict[int, nn.Parameter]
"""The copies made for one adapter, by the ``id`` of the base's parameter: tied parameters have one copy."""


class TunedParameters(WeightAdapter):
    """A trainable copy of parameters (and buffers) of one module, read in place of its own."""

    def __init__(self, host: nn.Module, names: Sequence[str] | None = None, copies: Copies | None = None) -> None:
        """Copy the parameters ``names`` of ``host``, all that it reads if None.

        Raises:
            NotApplicableError: a parameter is quantized, complex, or not there yet (a lazy layer).
        """
        super().__init__()
        self.names = read_parameters(host) if names is None else tuple(names)
        # Quantized layers cast their bias where it lies, which must not narrow the copy that trains.
        self._lent = any(is_quantized(p) for p in host._parameters.values() if p is not None)
        self._places: dict[str, str] = {}
        for path in self.names:
            own = path.replace(".", "_")  # "out_proj.weight" cannot be the name of a parameter
            while hasattr(self, own):
                own += "_"
            self._places[path] = own
            owner, name = host.get_submodule(parent(path)), leaf(path)
            if name in owner._parameters:
                self.register_parameter(own, trainable_copy(getattr(owner, name), path, copies))
            else:
                self.register_buffer(own, getattr(owner, name).detach().clone())

    def forward(self, weight: Tensor, name: str) -> Tensor:
        own: Tensor = getattr(self, self._places[name])
        return own.view_as(own).to(weight.dtype) if self._lent else own.to(weight.dtype)

    def copies(self) -> dict[str, Tensor]:
        """The copies by the names that the base's own have."""
        return {path: getattr(self, own) for path, own in self._places.items()}

    def combine(self, sources: Sequence["TunedParameters"], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        for path, own in self._places.items():
            if own in self._buffers:
                raise NotApplicableError(
                    f"it has statistics of its own ('{path}'), which do not add up. Leave that layer out of "
                    "modules_to_save."
                )
            values = [source.get_parameter(own) for source in sources]
            base = parameters[path].to(values[0].dtype)
            self.get_parameter(own).copy_(base + recipe.mix([value - base for value in values]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TunedParameters":
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        # Buffers follow every cast: the host updates them in place, so it must get the very tensors in its own dtype.
        self._buffers.update({name: fn(buffer) for name, buffer in buffers.items()})
        return self


class FullyTrainedParameters(TunedParameters):
    """The copy of a module of ``modules_to_save``, which is fully trained."""


def trainable_copy(tensor: Tensor, name: str, copies: Copies | None = None) -> nn.Parameter:
    """A parameter with the values of ``tensor`` in full precision; one of ``copies`` if that has it already.

    Raises:
        NotApplicableError: the parameter is quantized, complex, or not there yet (a lazy layer).
    """
    check_trainable(tensor, name)
    copies = {} if copies is None else copies
    if id(tensor) not in copies:
        copies[id(tensor)] = nn.Parameter(tensor.detach().to(adapter_dtype(tensor), copy=True))
    return copies[id(tensor)]
