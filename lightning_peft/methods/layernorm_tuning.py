r"""LayerNorm tuning: only the norms' gains and biases train. Qi et al., 2022, arXiv:2211.08682 (LN-tuning).

.. math:: y = \gamma' \odot \frac{x - \mu}{\sigma} + \beta'

γ' and β' start as γ and β. Compared with other methods in Liu et al., 2022, arXiv:2205.05638, and used to turn language
models into multi-modal ones in Zhao et al., 2023, arXiv:2312.11420.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lightning_peft.components.entries import tune
from lightning_peft.components.tuned import TunedParameters
from lightning_peft.core.fields import Patterns
from lightning_peft.core.method import Placement, Plan
from lightning_peft.core.peft_form import PeftFile, PeftState, PeftTensor, exact_names, exact_targets
from lightning_peft.core.targeted import TargetedMethod
from lightning_peft.network.parameters import read_parameters


@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(TargetedMethod):
    """Training of the weights and biases of norms (LayerNorm, RMSNorm, GroupNorm, BatchNorm and their like).

    Running statistics, where a norm has any, stay those of the base.

    Raises:
        NotApplicableError: the model has no norm with parameters, or a named layer is none.
    """

    peft_types: ClassVar[tuple[str, ...]] = ("LN_TUNING",)

    target_modules: Patterns = None
    """Norms that train: None for all but those of the task head; else a list of names or suffixes (all below is meant
    too), or one regular expression for whole names."""

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        return Plan(tune(self.select_parameters(model, fully_trained, kinds={"norm"})))

    def to_peft(self, placements: Sequence[Placement], model: nn.Module) -> PeftState | None:
        tensors: dict[str, PeftTensor] = {}
        for placement in placements:
            path, adapter = placement.path, placement.adapter
            # peft copies whole layers: those with running statistics would have them twice, and train them.
            if not isinstance(adapter, TunedParameters) or {*read_parameters(model.get_submodule(path))} != {
                *adapter.copies()
            }:
                return None
            for name, copy in adapter.copies().items():
                tensors[f"{path}.{_LAYERS}.{name}"] = PeftTensor((copy,))
        names = [placement.path for placement in placements]
        return PeftState(
            config={"peft_type": "LN_TUNING", "target_modules": exact_targets(names, model)}, tensors=tensors
        )

    @classmethod
    def from_peft(cls, file: PeftFile) -> tuple["LayerNormTuning", Mapping[str, Tensor]]:
        file.check_fields()
        names = file.hosts(f"{_LAYERS}.weight", f"{_LAYERS}.bias")
        return cls(target_modules=exact_names(names, file.model), modules_to_save=None), file.tensors


_LAYERS = "ln_tuning_layers"
