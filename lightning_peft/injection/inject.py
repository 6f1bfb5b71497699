"""Putting an adapter into a model and taking it out again."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.components.modules_to_save import plan_modules_to_save, resolve_modules_to_save
from lightning_peft.core.adapter import CallAdapter, WeightAdapter
from lightning_peft.core.method import Method, Placement
from lightning_peft.errors import AdapterNameError, ConfigError, NotApplicableError, PEFTError
from lightning_peft.injection.freezing import freeze, unfreeze
from lightning_peft.injection.names import slot_name
from lightning_peft.injection.reads import ReadWeights, plan_reads, unseen_reads
from lightning_peft.injection.registry import AttachedAdapter, Registry, find_adapter, registry_of, set_registry
from lightning_peft.injection.report import Report, report
from lightning_peft.injection.running import RunWatch
from lightning_peft.injection.slots import AdapterSlots, named_slots
from lightning_peft.injection.standins import can_stand_in
from lightning_peft.network.quantized.weights import is_quantized
from lightning_peft.network.reads import only_read
from lightning_peft.network.walk import CHILD, leaf, module_at, parent


def inject(model: nn.Module, method: Method, name: str = "default") -> Report:
    """Freeze ``model`` and add the adapter ``name`` to it.

    The new adapter acts beside those that are active already. The base keeps its class, its parameter names and its
    values; its normalisation layers with running statistics stay in eval mode. If anything is wrong, the model is left
    as it was.

    Args:
        model: any network. Call this on the outermost module you train, so that all of it is frozen.
        method: what to inject, such as ``LoRA(r=8)``.
        name: the adapter's name, part of its parameter names.

    Returns:
        A report of what was injected, what trains, and what is frozen. ``print`` shows it as a table.

    Raises:
        AdapterNameError: the name is taken, or cannot be a name.
        PEFTError: the method does not fit the model.
    """
    return attach(model, plan_injection(model, method, name))


@dataclass(frozen=True)
class Injection:
    """What :func:`inject` is about to do, planned and checked."""

    name: str
    method: Method
    fully_trained: tuple[str, ...]
    """Paths of the modules that are fully trained."""
    placements: tuple[Placement, ...]
    """The adapters and where they go, those of the modules that are fully trained among them."""
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    """Lines of the method's for the report."""


def plan_injection(model: nn.Module, method: Method, name: str) -> Injection:
    """Plan and check what :func:`inject` does. The model is only read.

    Raises:
        AdapterNameError: the name is taken, or cannot be a name.
        PEFTError: the method does not fit the model.
    """
    if not isinstance(method, Method):
        raise ConfigError(f"inject needs a method such as LoRA(r=8), not {method!r}.")
    registry = registry_of(model) or Registry()
    registry.check_settled()
    _check_level(model, registry)
    check_name(name, registry)
    fully_trained = resolve_modules_to_save(model, method.modules_to_save)
    try:
        plan = method.plan(model, fully_trained)
    except RuntimeError as error:  # torch has one class for all, and says it in words
        if isinstance(error, PEFTError) or not re.search("allocate memory|out of memory|overflow", str(error)):
            raise
        raise ConfigError(
            f"There is no memory for the adapters of {method} in {type(model).__name__} ({error}). Choose smaller ones."
        ) from error
    placements = [*plan.placements, *plan_modules_to_save(model, fully_trained)]
    notes = (*plan.notes, *unseen_reads(model, placements))
    placements += plan_reads(model, placements)
    _check_hosts(model, placements)
    return Injection(name, method, tuple(fully_trained), tuple(placements), tuple(plan.left_out), notes)


def attach(model: nn.Module, injection: Injection, acts: bool = True) -> Report:
    """Do what was planned, and let the adapter act beside those that do already, if it ``acts``. Nothing here fails."""
    registry, name = registry_of(model) or Registry(), injection.name
    if not registry.attachments:
        freeze(model, registry)
        set_registry(model, registry)
        registry.watch = RunWatch(model, registry)
    added: set[int] = set()
    for placement in injection.placements:
        host = model.get_submodule(placement.path)
        if CHILD not in host._modules:
            host.add_module(CHILD, AdapterSlots(placement.path, registry.scopes))
        slots = registry.slots.setdefault(placement.path, host._modules[CHILD])  # type: ignore[arg-type]
        slots.add(slot_name(name, placement.part), placement.adapter, host)
        if not host.training or not placement.adapter.training:
            slots.train(host.training)
        added.add(id(placement.adapter))

    registry.attachments[name] = AttachedAdapter(
        method=injection.method,
        keys=keys_of(model, added),
        fully_trained=injection.fully_trained,
        left_out=injection.left_out,
        notes=injection.notes,
        trains=acts,
    )
    registry.watch.start(model)
    if acts:
        registry.scopes.default_changes()
        registry.activate((*registry.active, name))
    return report(model)


def remove(model: nn.Module, name: str = "default") -> None:
    """Take the adapter ``name`` out. With the last one gone, the model is bit for bit, and trains, as before.

    Raises:
        AdapterNameError: there is no such adapter.
    """
    _, owner, registry = find_adapter(model, name)
    registry.check_settled()
    detach(owner, registry, name)


def detach(owner: nn.Module, registry: Registry, name: str) -> None:
    """Do what :func:`remove` does; nothing here fails, also where a host was replaced."""
    # A host that carries nothing any more has no child of ours either: the base is then what it was.
    for path, slots in list(registry.slots.items()):
        slots.discard(name)
        if not slots._modules:
            place = module_at(owner, path)
            for module in () if place is None else place.modules():  # it may be wrapped
                if module._modules.get(CHILD) is slots:
                    del module._modules[CHILD]
                    break
            del registry.slots[path]
    del registry.attachments[name]
    registry.active = tuple(active for active in registry.active if active != name)
    if not registry.attachments:
        unfreeze(owner, registry)
        set_registry(owner, None)
        notify: Any = getattr(owner, "on_last_adapter_removed", None)
        if callable(notify):
            notify()


def keys_of(model: nn.Module, adapters: set[int]) -> frozenset[str]:
    """The state-dict keys of the adapters with these ids."""
    return frozenset(
        key
        # By every name: a module that is used twice has two.
        for path, module in model.named_modules(remove_duplicate=False)
        if id(module) in adapters
        for key in module.state_dict(prefix=f"{path}.", keep_vars=True)
    )


def check_name(name: str, registry: Registry) -> None:
    """Raise unless a new adapter can be called ``name``.

    Raises:
        AdapterNameError: it cannot.
    """
    if name in registry.attachments:
        raise AdapterNameError(
            f"There is an adapter {name!r} already ({registry.attachments[name].method}). "
            "Give the new one another name, or remove(model, name) first."
        )
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name) or hasattr(AdapterSlots(), name):
        raise AdapterNameError(
            f"{name!r} cannot be the name of an adapter: use letters, digits, '_' and '-', and no attribute of "
            "nn.Module."
        )


def _check_level(model: nn.Module, registry: Registry) -> None:
    own = {id(slots) for slots in registry.slots.values()}
    for path, host, slots in named_slots(model):
        if id(slots) not in own:
            raise AdapterNameError(
                f"'{path}' ({type(host).__name__}) carries adapters {list(slots.active)} that were injected on another "
                "module above or below this one. Inject all adapters of a network on the same module."
            )


def _check_hosts(model: nn.Module, placements: list[Placement]) -> None:
    for placement, count in Counter((p.path, p.part) for p in placements).items():
        if count > 1:
            raise ConfigError(f"{count} adapters of one name on '{placement[0]}': give each a part of its own.")
    # Now, and not while attaching, which must not fail halfway.
    read = only_read(model)
    for own in placements:
        host = model.get_submodule(own.path)
        if id(host) in read and not isinstance(own.adapter, WeightAdapter):
            raise NotApplicableError(
                f"{type(own.adapter).__name__} acts where '{own.path}' ({type(host).__name__}) is called, and it never "
                "is: a module above reads its weights. Leave it out (exclude_modules)."
            )
        if isinstance(own.adapter, WeightAdapter):
            _check_weights(host, own, own.adapter.names)
        if isinstance(own.adapter, (WeightAdapter, CallAdapter)) and not can_stand_in(host):
            raise NotApplicableError(
                f"The forward of '{own.path}' ({type(host).__name__}) was replaced by {vars(host)['forward']!r}, which "
                "holds the module in a way that is not known, so that no other weights can be given to it. Replace it "
                "by a bound method, or after the adapter was attached."
            )
    for path in {p.path for p in placements if not isinstance(p.adapter, ReadWeights)}:
        host = model.get_submodule(path)
        if isinstance(host, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise ConfigError(
                f"'{path}' is a {type(host).__name__}, which runs its children: target a layer inside it."
            )
        present = getattr(host, CHILD, None)
        if present is not None and not isinstance(present, AdapterSlots):
            raise AdapterNameError(
                f"'{path}' ({type(host).__name__}) has an attribute '{CHILD}' of its own, where adapters go: rename it."
            )


def _check_weights(host: nn.Module, placement: Placement, names: Iterable[str]) -> None:
    for name in names:
        weight = host.get_submodule(parent(name))._parameters.get(leaf(name))
        if weight is not None and is_quantized(weight):
            raise NotApplicableError(
                f"{type(placement.adapter).__name__} changes the '{name}' of '{placement.path}' "
                f"({type(host).__name__}) itself, and that is quantized ({type(weight).__name__}). Leave the layer out "
                "(exclude_modules), or use a method that acts on outputs."
            )
