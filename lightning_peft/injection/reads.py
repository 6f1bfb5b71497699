"""Adapters of layers whose weights a module above them reads itself (:mod:`lightning_peft.network.reads`).

The adapters stay at their layer, where calls meet them as ever. What reads the layer's weight sees what ``merge`` would
write there: the reader's forward runs on a stand-in, and so does the layer inside it, which is only read; a call of it
comes to the layer itself.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, Reference, WeightAdapter, in_merge_order
from lightning_peft.core.method import Placement
from lightning_peft.core.recipes import Recipe
from lightning_peft.errors import NotMergeableError
from lightning_peft.injection.slots import AdapterSlots
from lightning_peft.network.quantized.weights import is_quantized
from lightning_peft.network.reads import reads_of
from lightning_peft.network.walk import CHILD, base_modules, join, leaf, parent

READS = "reads"
"""The part of what acts at a reader."""


class ReadWeights(WeightAdapter):
    """What a module reads of the weights of layers below it, with the adapters of these in them.

    An adapter that is no change of the weights, such as a gated one, acts where its layer is called, and not here.
    """

    computed_when_read = True

    def __init__(self, layers: Mapping[str, tuple[nn.Module, Sequence[str], Sequence[Adapter]]]) -> None:
        """Take part in what is read.

        Args:
            layers: by path from the reader: a layer, the names of its tensors that are read, and its adapters.
        """
        super().__init__()
        self.names = tuple(join(path, name) for path, (_, names, _) in layers.items() for name in names)
        self.layers = {path: Reference(layer) for path, (layer, _, _) in layers.items()}
        self.adapters = {
            path: [Reference(adapter) for adapter in in_merge_order(own)] for path, (_, _, own) in layers.items()
        }
        self.additive = all(adapter.module.additive for own in self.adapters.values() for adapter in own)

    def forward(self, weight: Tensor, name: str) -> Tensor:
        layer, own = self.layers[parent(name)].module, leaf(name)
        if isinstance(slots := layer._modules.get(CHILD), AdapterSlots):
            slots.note_run()
        held = {**layer._parameters, **layer._buffers, own: weight}
        # In at least fp32, as merge wants them: rounded once.
        tensors = {key: _widened(tensor) for key, tensor in held.items() if tensor is not None}
        for adapter in self.adapters[parent(name)]:
            try:
                tensors |= adapter.module.merge(tensors)
            except NotMergeableError:  # it acts where the layer is called
                continue
        return tensors[own].to(weight.dtype)

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}  # the adapters of the layers write their weights, which are what is read

    def combine(self, sources: Sequence["ReadWeights"], recipe: Recipe, parameters: Mapping[str, Tensor]) -> None:
        """Nothing is to do: the adapters that are read combine."""


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


def plan_reads(model: nn.Module, placements: Sequence[Placement]) -> Iterator[Placement]:
    """What has to act at the modules that read the weights of adapted layers."""
    adapted: dict[int, list[Adapter]] = {}
    for placement in placements:
        adapted.setdefault(id(model.get_submodule(placement.path)), []).append(placement.adapter)
    for path, module in base_modules(model):
        layers = {
            read.path: (layer, names, adapted[id(layer)])
            for read, layer in reads_of(module)
            # A packed weight says nothing to who reads it.
            if id(layer) in adapted and (names := [n for n in read.names if not is_quantized(getattr(layer, n))])
        }
        if layers:
            yield Placement(path, ReadWeights(layers), READS)
