"""Several methods as one adapter, trained together, saved together, switched together.

Presets: MAM, the mix-and-match adapter of He et al., 2022, arXiv:2110.04366 (a prefix in the attention, a parallel
adapter at the feedforward part), and UniPELT, Mao et al., 2022, arXiv:2110.07577 (LoRA in the attention, a prefix and
a bottleneck adapter, each behind a gate of its own).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_peft.core.fields import Patterns
from lightning_peft.core.method import Method, Plan
from lightning_peft.errors import ConfigError, did_you_mean

# By name, as in a file: methods do not import each other.
PRESETS: dict[str, list[dict[str, Any]]] = {
    "mam": [
        {"method": "PrefixTuning", "num_virtual_tokens": 30, "prefix_projection": True, "encoder_hidden_size": 512},
        {"method": "BottleneckAdapter", "preset": "parallel"},
    ],
    "unipelt": [
        {"method": "LoRA", "r": 8, "target_modules": ["attention"], "gating": True},
        {"method": "PrefixTuning", "num_virtual_tokens": 10, "gating": True},
        {"method": "BottleneckAdapter", "preset": "pfeiffer", "gating": True},
    ],
}


@dataclass(frozen=True)
class Combine(Method):
    """Several methods as one adapter: ``Combine([LoRA(r=8), PromptTuning()])``.

    Where two act on one layer, they do so in the order of the list.

    Raises:
        ConfigError: fewer than two methods, two that exclude each other, or a part with a modules_to_save of its own.
    """

    methods: list[Method] | None = None
    """The methods, two or more; at most one that puts a prompt before the text, and one prefix. None for the preset's,
    which are then kept here."""
    preset: str | None = None
    """In place of methods: "mam" or "unipelt". Without either it is "mam"."""
    modules_to_save: Patterns = "auto"
    """Modules fully trained beside the adapters, for all methods together: name suffixes, "auto", or None."""

    def __post_init__(self) -> None:
        known = list(PRESETS)
        if self.preset is not None and (self.methods is not None or self.preset not in known):
            raise ConfigError(
                f"Combine: give either methods, as one list, or one of the presets {', '.join(known)}; not "
                f"preset={self.preset!r}{'.' if self.methods is None else ' with methods.'}"
                f"{'' if self.preset in known else did_you_mean(str(self.preset), known)}"
            )
        if self.methods is None:
            # What a preset stands for is kept in its place, so that a file means the same in every version.
            object.__setattr__(self, "methods", [Method.from_config(part) for part in PRESETS[self.preset or "mam"]])
            object.__setattr__(self, "preset", None)
        if not isinstance(self.methods, (list, tuple)) or not all(isinstance(m, Method) for m in self.methods):
            raise self.invalid("methods", "a list of methods, such as [LoRA(r=8), PromptTuning()]")
        if len(self.methods) < 2 or any(isinstance(method, Combine) for method in self.methods):
            raise self.invalid("methods", "a list of two or more methods, none of them Combine")
        # Two prompts would each take the first positions.
        for kind, count in Counter(method.exclusive for method in self.methods if method.exclusive).items():
            if count > 1:
                names = [type(method).__name__ for method in self.methods if method.exclusive == kind]
                raise ConfigError(
                    f"Combine: {' and '.join(names)} both bring a {kind}, and there is room for one. Use one with more "
                    "num_virtual_tokens, or two adapters: inject(model, method, name)."
                )
        super().__post_init__()
        for method in self.methods:
            if method.modules_to_save not in ("auto", None, self.modules_to_save):
                raise ConfigError(
                    f"Combine: {type(method).__name__} has modules_to_save={method.modules_to_save!r}. Give that to "
                    "Combine, for all methods together."
                )

    @property
    def starts_as_base(self) -> bool:
        return all(method.starts_as_base for method in self.methods or ())

    def planner_of(self, part: str) -> Method:
        index, _, rest = part.partition("_")
        return (self.methods or [])[int(index)].planner_of(rest)

    def ejected(self) -> "Combine":
        return replace(self, methods=[method.ejected() for method in self.methods or []])

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        plans = [method.plan(model, fully_trained) for method in self.methods or ()]
        return Plan(
            [
                replace(placement, part=f"{i}_{placement.part}" if placement.part else str(i))
                for i, plan in enumerate(plans)
                for placement in plan.placements
            ],
            [left for plan in plans for left in plan.left_out],
        )
