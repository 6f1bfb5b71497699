"""Checks of a module with adapters that trains, before time is lost."""

from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.checkpoints.ckpt import adapter_keys
from lightning_peft.errors import ConfigError, GradientError, OptimizerError, PEFTError
from lightning_peft.injection.names import owner_of
from lightning_peft.injection.registry import registries
from lightning_peft.network.walk import CHILD, join


def check_at_least(owner: str, least: int, **options: int) -> None:
    """Raise if an option of ``owner``, a class, is below ``least``.

    Raises:
        ConfigError: one is.
    """
    for name, value in options.items():
        if value < least:
            raise ConfigError(f"{owner}: {name}={value} must be at least {least}.")


def check_still_there(module: nn.Module) -> None:
    """Raise if a layer was replaced after its adapters were attached.

    Raises:
        PEFTError: it was, so trained adapters would be lost.
    """
    for path, owner, registry in registries(module):
        for host, slots in registry.slots.items():
            if _submodule(owner, join(host, CHILD)) is not slots:
                raise PEFTError(
                    f"'{join(path, host)}' of {type(module).__name__} was built anew "
                    "after its adapters were attached, and lost them. Build the network once: begin setup() or "
                    "configure_model() with a check whether it is there; and where a precision plugin replaces layers "
                    "(BitsandbytesPrecision), leave the injecting to PEFTCallback."
                )


def check_all_is_saved(module: nn.Module) -> None:
    """Raise if something trains that an adapter checkpoint would not hold.

    Raises:
        PEFTError: it does.
    """
    keys = adapter_keys(module)
    lost = [name for name, p in module.named_parameters() if p.requires_grad and name not in keys]
    if lost:
        raise PEFTError(
            f"{len(lost)} parameters train that belong to no adapter, first '{lost[0]}': an adapter checkpoint would "
            f"lose them. Inject on {type(module).__name__} itself, which freezes all of it, and name what is to be "
            "fully trained in modules_to_save; nothing may unfreeze the base afterwards."
        )


def check_optimizers(trainer: L.Trainer, module: nn.Module) -> None:
    """Raise if a parameter trains that no optimizer holds.

    Raises:
        OptimizerError: it does.
    """
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if missing := [name for name, parameter in named.items() if id(parameter) not in held]:
        raise OptimizerError(
            f"{len(missing)} of {len(named)} parameters that should train are in no optimizer, first '{missing[0]}'. "
            "Give configure_optimizers all that trains: "
            "torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=...)."
        )


def check_loss(module: nn.Module, loss: Tensor) -> None:
    """Raise if nothing that trains took part in ``loss``.

    Raises:
        GradientError: nothing did.
    """
    if not loss.requires_grad:
        _raise_if_any([name for name, _ in _trained(module)], module)


class GradientWatch:
    """Notes which parameters of the adapters have had a gradient, whoever has called ``backward``.

    Args:
        module: the module with the adapters.
        optimizers: the optimizers that hold their parameters.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self.module, self.missing = module, dict(_trained(module))
        self._stepped: set[int] = set()
        self._handles: list[Any] = [
            parameter.register_post_accumulate_grad_hook(partial(self._seen, name))
            for name, parameter in self.missing.items()
        ]
        self._handles += [optimizer.register_step_pre_hook(self._steps) for optimizer in optimizers]

    def check(self) -> None:
        """Stop watching, and raise if a parameter has had no gradient.

        Raises:
            GradientError: one has not.
        """
        self.stop()
        _raise_if_any(self.missing, self.module)

    def check_stepped(self) -> bool:
        """Check the parameters of optimizers that have made a step; other optimizers have their turn to come.

        Returns:
            True if nothing is left to watch.

        Raises:
            GradientError: a parameter was stepped and has had no gradient.
        """
        stepped = [name for name, parameter in self.missing.items() if id(parameter) in self._stepped]
        _raise_if_any(stepped, self.module)
        if not self.missing:
            self.stop()
        return not self.missing

    def stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _seen(self, name: str, parameter: nn.Parameter) -> None:
        self.missing.pop(name, None)

    def _steps(self, optimizer: Optimizer, *args: Any) -> None:
        self._stepped.update(id(parameter) for group in optimizer.param_groups for parameter in group["params"])


def check_all_run(module: nn.Module) -> None:
    """Warn once if an adapted layer has not run, now that a batch is through."""
    for _, owner, registry in registries(module):
        registry.watch.judge_if_open(owner)


def _raise_if_any(missing: Collection[str], module: nn.Module) -> None:
    if not missing:
        return
    owners = [owner for name in missing if (owner := owner_of(name))]
    adapters, hosts = sorted({name for _, name in owners}), list(dict.fromkeys(host for host, _ in owners))
    found = [(prefix, registry.slots) for prefix, _, registry in registries(module)]
    ran = {join(prefix, path): own.ran for prefix, slots in found for path, own in slots.items()}
    first = next((host for host in hosts if not ran[host]), hosts[0])
    reason = (
        "the loss does not depend on that layer's output. See whether the module detaches it or runs it under no_grad"
        if ran[first]
        else "that layer did not run. See whether another one runs in its place, or its weight is read elsewhere than "
        "in the forward of a module above it"
    )
    raise GradientError(
        f"The adapter {', '.join(map(repr, adapters))} got no gradient at {len(hosts)} of its layers, first '{first}': "
        f"{reason}, or leave it out (exclude_modules=[{first!r}])."
    )


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of all adapters that train, by their names in ``module``."""
    for prefix, _, registry in registries(module):
        for name in registry.attachments:
            for path, adapter in registry.adapters(name):
                slot = next(slot for slot, child in registry.slots[path].named_children() if child is adapter)
                for key, parameter in adapter.named_parameters():
                    if parameter.requires_grad:
                        yield join(prefix, path, CHILD, slot, key), parameter


def _submodule(owner: nn.Module, path: str) -> nn.Module | None:
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None
