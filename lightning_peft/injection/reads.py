"""Adapters of layers whose weights a module above them reads itself (:mod:`lightning_peft.network.reads`).

The adapters stay at their layer, where calls meet them as ever. What reads the layer's weight sees what ``merge`` would
write there: the reader's forward runs on a stand-in, and so does the layer inside it, which is only read; a call of it
comes to the layer itself.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lightning_peft.core.adapter import Reference, WeightAdapter, in_merge_order
from lightning_peft.core.method import Placement
from lightning_peft.core.recipes import Recipe
from lightning_peft.errors import NotApplicableError, NotMergeableError
from lightning_peft.injection.slots import AdapterSlots
from lightning_peft.network.quantized.weights import is_quantized
from lightning_peft.network.reads import reads_beside, reads_of
from lightning_peft.network.walk import CHILD, is_wrapper, join, leaf, modules_outside, parent, unwrapped

READS = "reads"
"""The part of what acts at a reader."""


class ReadWeights(WeightAdapter):
    """What a module reads of the weights of layers below it, with the adapters in them that act there.

    An adapter that is no change of the weights, such as a gated one, acts where its layer is called, and not here.
    """

    computed_when_read = True
    additive = True

    def __init__(self, layers: Mapping[str, tuple[nn.Module, nn.Module, Sequence[str]]]) -> None:
        """Take part in what is read.

        Args:
            layers: by path from the reader: a layer, the module that carries its adapters (torch may have wrapped the
                layer in it), and the names of its tensors that are read.
        """
        super().__init__()
        self.names = tuple(join(path, name) for path, (*_, names) in layers.items() for name in names)
        self.layers = {path: Reference(layer) for path, (layer, *_) in layers.items()}
        self.hosts = {path: Reference(host) for path, (_, host, _) in layers.items()}

    def forward(self, weight: Tensor, name: str, acting: tuple[str, ...] = ()) -> Tensor:
        """What ``merge`` would make of a layer's tensor, adapter by adapter in the order in which they act.

        Args:
            weight: the tensor.
            name: its path from the reader.
            acting: the adapters that act for the code that is running.
        """
        layer, own = self.layers[parent(name)].module, leaf(name)
        slots = self.hosts[parent(name)].module._modules.get(CHILD)
        if not isinstance(slots, AdapterSlots):
            return weight
        slots.note_run()
        held = {**layer._parameters, **layer._buffers, own: weight}
        # In at least fp32, as merge wants them: rounded once.
        tensors = {key: _widened(tensor) for key, tensor in held.items() if tensor is not None}
        for adapter in in_merge_order([part for by in acting for part in slots.parts(by).values()]):
            try:
                tensors |= adapter.merge(tensors)
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
    """What has to act at the modules that read the weights of adapted layers.

    Raises:
        NotApplicableError: a reader writes into such a weight, too.
    """
    adapted = _adapted(model, placements)
    for path, module in modules_outside(model):
        layers = {}
        for read, layer in [] if is_wrapper(module) else reads_of(module):
            # A packed weight says nothing to who reads it.
            names = [name for name in read.names if not is_quantized(getattr(layer, name))]
            if id(layer) not in adapted or not names:
                continue
            plain, host = adapted[id(layer)]
            if read.writes:
                raise NotApplicableError(
                    f"The forward of '{path}' ({type(module).__name__}) reads the weights of '{plain}', "
                    "and writes into them, which does not go with what an adapter makes of them. Leave that layer out "
                    "(exclude_modules)."
                )
            layers[read.path] = layer, host, names
        if layers:
            yield Placement(path, ReadWeights(layers), READS)


def unseen_reads(model: nn.Module, placements: Sequence[Placement]) -> list[str]:
    """Lines for the report: methods beside a forward that read the weights of adapted layers, and see the base's."""
    adapted = _adapted(model, placements)
    return [
        f"{type(module).__name__}.{method} reads the weights of '{adapted[id(layer)][0]}' and is not part of a "
        "forward: it sees the base's. Read them in a forward."
        for _, module in modules_outside(model)
        for method, layer in reads_beside(module)
        if id(layer) in adapted
    ]


def _adapted(model: nn.Module, placements: Sequence[Placement]) -> dict[int, tuple[str, nn.Module]]:
    """The path of each adapted layer, by the layer's id, and the module that carries its adapters."""
    hosts = {placement.path: model.get_submodule(placement.path) for placement in placements}
    return {id(unwrapped(host)): (path, host) for path, host in hosts.items()}
