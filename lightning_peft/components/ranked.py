"""Methods whose layers have a rank and a scale, each by patterns if need be."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_peft.core.fields import Count, Positive
from lightning_peft.core.targeted import LayerMethod
from lightning_peft.errors import TargetError
from lightning_peft.network.hosts import Host
from lightning_peft.network.patterns import matches_end, pattern_value


@dataclass(frozen=True, kw_only=True)
class RankedMethod(LayerMethod):
    """A method with a rank r and a scale alpha / r for each layer.

    In the peft package's files a tensor's shape tells the rank; the method's table names it (``PeftTable.rank``).

    Raises:
        ConfigError: a field is out of range.
    """

    r: Count = 8
    """Rank of the update; above the smaller side of a layer's matrix it adds parameters and nothing else."""
    alpha: Positive = 16.0
    """Numerator of the scale."""
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    """Ranks of layers whose name ends in the key (a suffix or a regular expression)."""
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)
    """Alphas of layers whose name ends in the key (a suffix or a regular expression)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, patterns in self._patterns().items():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise self.invalid(name, f"keyed by suffixes or regular expressions ({error})") from error

    def rank_of(self, host: Host) -> int:
        """The rank of one layer."""
        return pattern_value(self.rank_pattern, host.name, self.r)

    def scale_of(self, host: Host) -> float:
        """What the update of one layer is multiplied with."""
        return self.scaled(pattern_value(self.alpha_pattern, host.name, self.alpha), self.rank_of(host))

    def scaled(self, alpha: float, r: int) -> float:
        """The scale that an alpha gives at a rank."""
        return alpha / r

    def select(self, model: nn.Module, fully_trained: Sequence[str]) -> list[Host]:
        hosts = super().select(model, fully_trained)
        for name, patterns in self._patterns().items():
            for pattern in patterns:
                if not any(matches_end(pattern, host.name) for host in hosts):
                    raise TargetError(
                        f"{type(self).__name__}.{name}: {pattern!r} matches none of the {len(hosts)} adapted layers, "
                        f"such as '{hosts[0].name}'."
                    )
        return hosts

    def notes(self, hosts: Sequence[Host]) -> list[str]:
        full = {host.name: min(host.layout.out_features, host.layout.in_features) for host in hosts}
        above = [host for host in hosts if self.rank_of(host) > full[host.name]]
        if not above:
            return []
        return [
            f"the rank is larger than the smaller side of {len(above)} layers, such as {self.rank_of(above[0])} at "
            f"'{above[0].name}', which can use {full[above[0].name]}"
        ]

    def _patterns(self) -> Mapping[str, Mapping[str, float]]:
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
