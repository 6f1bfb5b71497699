r"""BitFit: of the pretrained parameters, only the biases train. Ben Zaken et al., 2021, arXiv:2106.10199.

.. math:: y = W x + b', \qquad y = \gamma \odot \frac{x - \mu}{\sigma} + \beta'

b' and β' start as b and β. The paper also trains a subset, the biases of the queries and of the first layer of the FFN:
``BitFit(target_modules=["query", "intermediate.dense"])`` for BERT.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_peft.components.entries import tune
from lightning_peft.core.fields import Patterns
from lightning_peft.core.method import Plan
from lightning_peft.core.targeted import TargetedMethod


@dataclass(frozen=True, kw_only=True)
class BitFit(TargetedMethod):
    """Training of bias vectors: of linear, convolution, attention and recurrent layers, and of norms.

    Raises:
        NotApplicableError: the model, or a named layer, has no bias.
    """

    target_modules: Patterns = None
    """Layers whose biases train: None for all but the task head; else a list of names or suffixes (all below is meant
    too), roles and the words "norm" and "embedding", or one regular expression for whole names. Roles: attention,
    query, key, value, attention-output, ffn, ffn-output."""

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        return Plan(tune(self.select_parameters(model, fully_trained, kinds={"bias"})))
