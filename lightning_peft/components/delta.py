"""Adapters that add a matrix to a weight, made anew in each forward pass: for updates that are no product of two."""

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from lightning_peft.core.adapter import Adapter, OutputAdapter, WeightAdapter
from lightning_peft.network.hosts import Host


class Delta(Adapter):
    """A change of one weight, wherever it acts."""

    additive = True

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.layout = host.layout

    @abstractmethod
    def delta(self) -> Tensor:
        """What is added to the weight, as a matrix (out, in)."""


class DeltaOutput(Delta, OutputAdapter):
    """Adds what the change makes of the host's input to its output."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.layout.apply(x, self.delta().to(y.dtype))

    def merge(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = parameters["weight"]
        return {"weight": weight + self.layout.native(self.delta()).to(weight.dtype)}


class DeltaWeight(Delta, WeightAdapter):
    """Adds the change to a weight that its host reads itself."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.names = (host.parameter,)

    def forward(self, weight: Tensor, name: str) -> Tensor:
        return weight + self.layout.native(self.delta()).to(weight.dtype)
