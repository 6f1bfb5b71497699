"""LayerNormTuning: peft copies whole layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_peft.checkpoints.peft.formats import PeftFormat, formats
from lightning_peft.checkpoints.peft.state import PeftFile, PeftState, exact_names, exact_targets
from lightning_peft.checkpoints.tensors import TensorView
from lightning_peft.components.tuned import TunedParameters
from lightning_peft.core.method import Method, Placement
from lightning_peft.methods.layernorm_tuning import LayerNormTuning
from lightning_peft.network.parameters import read_parameters

_LAYERS = "ln_tuning_layers"


@formats(LayerNormTuning)
class LayerNormFormat(PeftFormat):
    """The copies of a layer's parameters, by their names in it."""

    def to_peft(self, method: Any, placements: Sequence[Placement], model: Any) -> PeftState | None:
        tensors: dict[str, TensorView] = {}
        for placement in placements:
            path, adapter = placement.path, placement.adapter
            every = {*read_parameters(model.get_submodule(path))}
            # Running statistics peft would have twice, and train.
            if not isinstance(adapter, TunedParameters) or every != {*adapter.copies()}:
                return None
            tensors |= {f"{path}.{_LAYERS}.{name}": TensorView((copy,)) for name, copy in adapter.copies().items()}
        names = exact_targets([placement.path for placement in placements], model)
        return PeftState(config={"peft_type": self.table.type, "target_modules": names}, tensors=tensors)

    def from_peft(self, file: PeftFile) -> tuple[Method, Mapping[str, Tensor]]:
        file.check_fields()
        names = file.hosts(f"{_LAYERS}.weight", f"{_LAYERS}.bias")
        return LayerNormTuning(target_modules=exact_names(names, file.model), modules_to_save=None), file.tensors
