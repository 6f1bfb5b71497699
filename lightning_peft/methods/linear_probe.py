r"""Linear probe: the task head trains on the features of a frozen base. Alain and Bengio, 2016, arXiv:1610.01644.

.. math:: y = W' f(x) + b', \qquad f \text{ the pretrained network}

The baseline against which every other method is to be seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_peft.core.fields import Patterns
from lightning_peft.core.method import Method, Plan
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.walk import join


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """Training of the task head alone.

    Raises:
        NotApplicableError: the model has no task head that can be told, and none is named.
    """

    modules_to_save: Patterns = "auto"
    """The task head: "auto" finds it in a transformers model; else name suffixes, such as ["head"]."""

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        if not fully_trained:
            found = "leaves nothing to train" if self.modules_to_save != "auto" else "finds no task head"
            raise NotApplicableError(
                f"LinearProbe: modules_to_save={self.modules_to_save!r} {found} in {type(model).__name__}. Name the "
                f"head, as in modules_to_save=['head']; parts of it here: {', '.join(_parts(model)) or 'none'}."
            )
        return Plan([])


def _parts(model: nn.Module, path: str = "") -> list[str]:
    """Paths of the outermost modules with parameters, from the first one on that has several."""
    children = [
        (join(path, name), child) for name, child in model.named_children() if any(True for _ in child.parameters())
    ]
    if len(children) == 1 and (inner := _parts(children[0][1], children[0][0])):
        return inner
    return [name for name, _ in children]
