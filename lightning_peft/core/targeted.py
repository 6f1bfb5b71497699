"""Methods that are pointed at parts of a network, and methods with one adapter for each chosen layer."""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_peft.core.adapter import Adapter, OutputAdapter
from lightning_peft.core.fields import Layers, Patterns
from lightning_peft.core.method import Method, Placement, Plan
from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.network.hosts import Host
from lightning_peft.network.parameters import BaseParameter, unknown_weights
from lightning_peft.network.targets import ALL_LINEAR, select_hosts, select_parameters
from lightning_peft.network.walk import within

SHARED = "shared"
"""The part of what a :class:`LayerMethod` makes once for all its hosts."""


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(Method):
    """A method that acts on chosen parts of the network."""

    target_modules: Patterns = None
    """What to adapt: a list of name suffixes and roles, or one regular expression for whole names; None for the places
    that the method finds itself. Roles: attention, query, key, value, attention-output, ffn, ffn-output."""
    exclude_modules: Patterns = None
    """Layers to leave alone: name parts (all below is left alone too), roles, or one regular expression."""
    layers: Layers = None
    """Indices of the layers to adapt in the outermost numbered container; negative ones count from the end."""
    modules_to_save: Patterns = "auto"
    """Modules fully trained beside the adapters: name suffixes; "auto" finds the task head of a transformers model."""

    def select_parameters(
        self,
        model: nn.Module,
        fully_trained: Sequence[str],
        kinds: Collection[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[BaseParameter]:
        """Choose parameters by the fields, and by kind and name, as :func:`.targets.select_parameters` does."""
        fields = self.target_modules, self.exclude_modules, self.layers
        return select_parameters(type(self).__name__, model, *fields, fully_trained, kinds, names)

    def pointed_at(self, paths: Sequence[str]) -> "TargetedMethod":
        return replace(self, target_modules=list(paths), exclude_modules=None, layers=None)


@dataclass(frozen=True, kw_only=True)
class LayerMethod(TargetedMethod):
    """A method that puts one adapter on each chosen layer."""

    target_modules: Patterns = None
    """Layers to adapt: "all-linear" (every linear layer but the task head; None means the same), a list of name
    suffixes and roles, or one regular expression for whole names. Roles: attention, query, key, value,
    attention-output, ffn, ffn-output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules is None:
            # Not as the default: jsonargparse hands values of one class on to the next, where it would mean something.
            object.__setattr__(self, "target_modules", ALL_LINEAR)

    def shared(self, hosts: Sequence[Host]) -> Adapter | None:
        """Make once what the adapters of all ``hosts`` use, such as a projection, as an adapter that does not act.

        It is stored once in files, at the first of the hosts. An adapter keeps a
        :class:`~lightning_peft.core.adapter.Reference` to it.
        """
        return None

    @abstractmethod
    def build(self, host: Host, shared: Any) -> Adapter:
        """Build the adapter of one host.

        Args:
            host: the layer's weight.
            shared: what :meth:`shared` has made.

        Where the start of the adapter's values is costly, ask :func:`~lightning_peft.core.starting.starts` first: those
        of a file are about to take their place.

        Raises:
            ConfigError: a field has a value that this host cannot take, such as a block larger than the layer.
            NotApplicableError: the method cannot work on this kind of host.
        """

    def check_input(self, host: Host, field: str) -> None:
        """Raise if ``field`` is set, which drops features of an input, and the host has no input of its own.

        Raises:
            NotApplicableError: names the host.
        """
        if host.weight_only and getattr(self, field):
            raise NotApplicableError(
                f"{type(self).__name__}.{field}={getattr(self, field)} cannot act on '{host.name}': "
                f"{type(host.module).__name__}, or a module above it, computes something of its own with that weight, "
                "so there is no input to drop from. "
                f"Set {field}=0 or exclude it (exclude_modules)."
            )

    def notes(self, hosts: Sequence[Host]) -> list[str]:
        """Lines for the report, on settings that are allowed and perhaps not meant."""
        return []

    def select(self, model: nn.Module, fully_trained: Sequence[str]) -> list[Host]:
        """Choose the hosts. Override to check fields that speak of the chosen hosts."""
        return select_hosts(model, self.target_modules or ALL_LINEAR, self.exclude_modules, self.layers, fully_trained)

    def plan(self, model: nn.Module, fully_trained: Sequence[str]) -> Plan:
        hosts, refusal = self.select(model, fully_trained), None
        placements, left_out = [], []
        if shared := self.shared(hosts):
            placements.append(Placement(hosts[0].path, shared, SHARED))
        for host in hosts:
            try:
                adapter = self.build(host, shared)
                if host.weight_only and isinstance(adapter, OutputAdapter):
                    raise NotApplicableError(
                        f"{type(self).__name__} acts on what a layer puts out, and '{host.name}' puts out nothing of "
                        f"its own: {type(host.module).__name__}, or a module above it, computes something with that "
                        "weight itself. Exclude it."
                    )
                placements.append(Placement(host.path, adapter, host.part))
            except ConfigError as error:
                if self.target_modules != ALL_LINEAR:  # asked for by name: not ours to drop
                    raise
                refusal = error
                left_out.append((host.name, str(error)))
        if refusal and len(left_out) == len(hosts):
            raise refusal
        if self.target_modules == ALL_LINEAR:
            left_out += [(name, reason) for name, reason in unknown_weights(model) if not within(name, fully_trained)]
        return Plan(placements, left_out, self.notes(hosts))
