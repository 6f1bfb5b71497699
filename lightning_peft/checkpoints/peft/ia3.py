"""IA3: one vector a layer, and a list of the layers whose input it scales."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_peft.checkpoints.peft.formats import PeftFormat, formats
from lightning_peft.checkpoints.peft.state import PeftFile, exact_names, listed
from lightning_peft.checkpoints.tensors import TensorView
from lightning_peft.core.method import Method, Placement
from lightning_peft.methods.ia3 import IA3, IA3Input, IA3Output
from lightning_peft.network.layouts import ConvLayout, EmbeddingLayout, TransposedLayout
from lightning_peft.network.patterns import match_names


@formats(IA3)
class IA3Format(PeftFormat):
    """Factors are (out, 1) for an output and (1, in) for an input, (1, channels, 1, 1) for a convolution."""

    def tensors_of(self, adapter: Any) -> Mapping[str, TensorView] | None:
        view = _view(adapter) if isinstance(adapter, (IA3Input, IA3Output)) else None
        return None if view is None else {"ia3_l": view}

    def config(self, method: Any, placements: Sequence[Placement]) -> dict[str, Any]:
        adapters: dict[str, Any] = {placement.path: placement.adapter for placement in placements}
        feedforward = [path for path, adapter in adapters.items() if isinstance(adapter, IA3Input)]
        return {
            # peft takes what ends in one of these, so that they have to be exact wherever target_modules is.
            "feedforward_modules": _feedforward(feedforward, [*adapters]),
            "fan_in_fan_out": any(isinstance(adapter.layout, TransposedLayout) for adapter in adapters.values()),
        }

    def from_peft(self, file: PeftFile) -> tuple[Method, Mapping[str, Tensor]]:
        file.check_fields("feedforward_modules", "init_ia3_weights")
        names, patterns = list(file.hosts("ia3_l")), listed(file.config, "feedforward_modules")
        if isinstance(file.config.get("feedforward_modules"), str):
            feedforward = sorted(match_names(patterns[0], names, "feedforward_modules"))
        else:  # peft asks for no dot before the name
            feedforward = [name for name in names if name.endswith(tuple(patterns))]
        method = IA3(
            target_modules=exact_names(names, file.model),
            feedforward_modules=exact_names(feedforward, file.model) or None,
            modules_to_save=None,
        )
        return method, file.tensors


def _view(adapter: IA3Input | IA3Output) -> TensorView | None:
    """The factors as peft has them; None where it has none."""
    scale = adapter.ia3_l.detach()
    ones = scale.new_ones(adapter.start) if isinstance(adapter, IA3Output) else scale[:0]  # peft scales all of a layer
    if isinstance(adapter.layout, ConvLayout):
        dims = len(adapter.layout.kernel)
        return None if dims == 1 else TensorView(tuple(x.view(1, -1, *[1] * dims) for x in (ones, scale)), dim=1)
    if isinstance(adapter, IA3Input):
        return TensorView((scale[None],))
    return None if isinstance(adapter.layout, EmbeddingLayout) else TensorView((ones[:, None], scale[:, None]))


def _feedforward(names: list[str], among: list[str]) -> list[str] | str:
    """What peft's ``feedforward_modules`` has to be for exactly ``names`` to match."""
    exact = all(other in names or not other.endswith(tuple(names)) for other in among) if names else True
    return names if exact else "|".join(map(re.escape, names))
