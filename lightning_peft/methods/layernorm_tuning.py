r"""LayerNorm tuning: only the norms' gains and biases train. Qi et al., 2022, arXiv:2211.08682 (LN-tuning).

.. math:: y = \gamma' \odot \frac{x - \mu}{\sigma} + \beta'

γ' and β' start as γ and β. Compared with other methods in Liu et al., 2022, arXiv:2205.05638, and used to turn language
models into multi-modal ones in Zhao et al., 2023, arXiv:2312.11420.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.components.entries import tune
from lightning_peft.core.fields import Patterns
from lightning_peft.core.method import Plan
from lightning_peft.core.peft_table import PeftTable
from lightning_peft.core.targeted import TargetedMethod


@dataclass(frozen=True, kw_only=True)
class LayerNormTuning(TargetedMethod):
    """Training of the weights and biases of norms (LayerNorm, RMSNorm, GroupNorm, BatchNorm and their like).

    Running statistics, where a norm has any, stay the base's.

    Raises:
        NotApplicableError: the model has no norm with parameters, or a named layer is none.
    """

    peft: ClassVar[PeftTable | None] = PeftTable(type="LN_TUNING")

    target_modules: Patterns = None
    """Norms that train: None for all outside of the task head; else a list of names or suffixes (all below is meant
    too), or one regular expression for whole names."""

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        return Plan(tune(self.select_parameters(model, fully_trained, kinds={"norm"})))
