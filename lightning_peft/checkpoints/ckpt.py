"""The adapter's part of a checkpoint: its tensors, and the record that lets it be attached and checked again."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.checkpoints.fingerprint import check_base, check_own_base, fingerprint
from lightning_peft.checkpoints.guard import as_checkpoint_error, limit_allocation
from lightning_peft.checkpoints.save_load import OWN_NAME, load_own
from lightning_peft.checkpoints.tensor_checks import check_finite
from lightning_peft.core.method import Method
from lightning_peft.errors import AdapterKeyError, AdapterNameError, CheckpointError, did_you_mean
from lightning_peft.injection.inject import Injection, inject, plan_injection, remove
from lightning_peft.injection.modules_to_save import resolve_modules_to_save
from lightning_peft.injection.registry import registries, registry_of
from lightning_peft.network.walk import CHILD, join, plain_name

METADATA_KEY = "lightning_peft"
"""The key of a ``.ckpt`` under which the record lies."""
METADATA_VERSION = 1


def adapter_keys(model: nn.Module) -> frozenset[str]:
    """The state-dict keys of every adapter at or below ``model``."""
    return frozenset(join(path, key) for path, _, registry in registries(model) for key in registry.own_keys())


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of every adapter at or below ``model``, by state-dict key without what torch.compile puts in."""
    keys = adapter_keys(model)
    return {plain_name(key): tensor for key, tensor in model.state_dict().items() if key in keys}


def metadata(model: nn.Module) -> dict[str, Any]:
    """Describe the adapters at or below ``model`` and their base, in primitives and tensors."""
    adapters = {
        f"{path}:{name}": {"path": path, "name": name, "method": attachment.method.to_config()}
        for path, registry in ((plain_name(path), registry) for path, _, registry in registries(model))
        for name, attachment in registry.attachments.items()
    }
    return {"version": METADATA_VERSION, "adapters": adapters, "base": fingerprint(model)}


@as_checkpoint_error()
def attach_metadata(model: nn.Module, metadata: Any, state: Mapping[str, Any]) -> None:
    """Attach what a record describes, or check that what is attached already is the same, and that ``state`` fits.

    Nothing is loaded yet. If anything is wrong, the model is left as it was. A ``state`` that holds the base as well
    (all of it) fits any base of these shapes.

    Raises:
        AdapterKeyError: a tensor of ``state`` is missing, left over, or of another shape or kind.
        BaseMismatchError: the adapters were trained on another base.
        CheckpointError: the record is damaged, of a newer version, or describes other adapters than those attached.
    """
    entries = methods_in(metadata)
    attached = {
        (plain_name(path), name): a.method for path, _, r in registries(model) for name, a in r.attachments.items()
    }
    modules = {plain_name(path): module for path, module in model.named_modules()}
    if missing := [name for path, name in attached if (path, name) not in entries]:
        raise CheckpointError(
            f"The file holds no adapter {missing[0]!r}; it holds {', '.join(repr(name) for _, name in entries)}. "
            "Use the adapter names that the file was written with."
        )
    fully_trained: list[str] = []
    for (path, name), method in entries.items():
        if (present := attached.get((path, name))) and present.to_config() != method.to_config():
            raise CheckpointError(f"Adapter {name!r} of the file is another one: {_differences(method, present)}.")
        if path not in modules:
            raise CheckpointError(
                f"The file's adapter {name!r} belongs on '{path}', and {type(model).__name__} has no such module. "
                "Load it into the class it was trained in."
            )
        fully_trained += [join(path, top) for top in resolve_modules_to_save(modules[path], method.modules_to_save)]
    _check_mapping(state)
    base = base_keys(model)
    if not (base & state.keys()):
        check_base(model, metadata.get("base"), tuple(fully_trained))
    added: list[tuple[nn.Module, str]] = []
    try:
        for (path, name), method in entries.items():
            if (path, name) not in attached:
                with limit_allocation(model, state.values()):
                    inject(modules[path], method, name)
                added.append((modules[path], name))
        _check_state(model, state, metadata.get("base"))
    except Exception as error:
        for owner, name in added:
            remove(owner, name)
        if isinstance(error, AdapterNameError):
            raise CheckpointError(f"The '{METADATA_KEY}' record of this file is damaged: {error}") from error
        raise


@as_checkpoint_error()
def prepare_metadata(model: nn.Module, metadata: Any, state: Mapping[str, Tensor], name: str) -> Injection:
    """Plan to attach one adapter of a checkpoint as ``name``, filled, beside what ``model`` carries already.

    The checkpoint's adapter of that name is taken, or the only one it has. The model is only read.

    Raises:
        BaseMismatchError: it was trained on another base.
        CheckpointError: the checkpoint does not hold such an adapter, or is damaged.
    """
    entries = {entry: method for (path, entry), method in methods_in(metadata).items() if not path}
    source = name if name in entries or len(entries) != 1 else next(iter(entries))
    if source not in entries:
        raise CheckpointError(
            f"The file holds no adapter {name!r} of the whole module; it holds "
            f"{', '.join(map(repr, entries)) or 'none'}. Give the new one that name."
        )
    _check_mapping(state)
    with limit_allocation(model, state.values()):
        injection = plan_injection(model, entries[source], name)
    check_base(model, metadata.get("base"), injection.fully_trained)
    own = re.compile(rf"(^|\.){CHILD}\.{re.escape(source)}(?=[.:])")
    found = {own.sub(rf"\1{CHILD}.{OWN_NAME}", key): value for key, value in state.items() if own.search(key)}
    load_own(injection.placements, found)
    return injection


def methods_in(metadata: Any) -> dict[tuple[str, str], Method]:
    """The methods that a record describes, by the path and the name of their adapters.

    Raises:
        CheckpointError: the record is damaged, or of a newer version.
        ConfigError: it names an unknown method, or a field has a value it cannot have.
    """
    if not isinstance(metadata, Mapping) or type(metadata.get("version")) is not int or metadata["version"] < 1:
        raise CheckpointError(
            f"The '{METADATA_KEY}' record of this file is damaged: {type(metadata).__name__} without a version."
        )
    if metadata["version"] > METADATA_VERSION:
        raise CheckpointError(
            f"The file was written by a newer lightning_peft (record version {metadata['version']}; this one reads up "
            f"to {METADATA_VERSION}). Upgrade lightning_peft."
        )
    try:
        entries = [(entry["path"], entry["name"], entry["method"]) for entry in metadata["adapters"].values()]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"The '{METADATA_KEY}' record of this file is damaged ({error!r}).") from error
    for path, name, _ in entries:
        if not isinstance(path, str) or not isinstance(name, str):
            raise CheckpointError(f"The '{METADATA_KEY}' record of this file is damaged: adapter {name!r} on {path!r}.")
    return {(path, name): Method.from_config(method) for path, name, method in entries}


def has_adapters(model: nn.Module) -> bool:
    """True if anything was injected on ``model`` itself or below."""
    return registry_of(model) is not None or any(True for _ in registries(model))


def base_keys(model: nn.Module) -> set[str]:
    """The state-dict keys of ``model`` that belong to no adapter, without what torch.compile puts in."""
    return {plain_name(key) for key in model.state_dict(keep_vars=True).keys() - adapter_keys(model)}


def _check_mapping(state: Any) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError("The 'state_dict' of this file is damaged: it is no mapping from names to tensors.")


def _check_state(model: nn.Module, state: Mapping[str, Any], base: Any) -> None:
    """Check that ``state`` holds the adapters of ``model``, or all of ``model``, and nothing else.

    Args:
        model: the network, its adapters attached.
        state: the tensors of the file.
        base: what the file records of its base, for the case that the base is in the file too.

    Raises:
        AdapterKeyError: a tensor is missing, left over, or of another shape or kind.
        CheckpointError: an adapter has values that are no numbers.
    """
    whole = {plain_name(key): value for key, value in model.state_dict(keep_vars=True).items()}
    own = frozenset(map(plain_name, adapter_keys(model)))
    full = bool(base_keys(model) & state.keys())
    wanted = whole if full else {key: whole[key] for key in own if key in whole}
    if missing := sorted(wanted.keys() - state.keys()):
        raise AdapterKeyError(
            f"The file lacks {len(missing)} of {len(wanted)} {'' if full else 'adapter '}tensors, first '{missing[0]}'."
            " It is damaged, or was written with other settings."
        )
    if extra := sorted(state.keys() - wanted.keys()):
        raise AdapterKeyError(
            f"The file holds {len(extra)} tensors that belong to no adapter of {type(model).__name__}, first "
            f"'{extra[0]}'.{did_you_mean(extra[0], wanted)}"
        )
    if full and base:
        check_own_base(state, base)
    for key, here in wanted.items():
        there = state[key]
        if not isinstance(here, Tensor):
            continue  # extra state of a module, whatever it is
        if not isinstance(there, Tensor) or there.shape != here.shape:
            found = list(there.shape) if isinstance(there, Tensor) else type(there).__name__
            raise AdapterKeyError(f"'{key}' is {found} in the file and must have shape {list(here.shape)}.")
        trained = key in own and isinstance(here, nn.Parameter)
        kind, found = _kind(here, exact=trained), "meta" if there.is_meta else _kind(there, exact=trained)
        if found != kind:
            raise AdapterKeyError(
                f"'{key}' is {found} in the file and must be {kind}: it was changed after it was saved, or belongs to "
                "a base of another precision."
            )
        if trained:
            check_finite(key, there)


def _kind(tensor: Tensor, exact: bool) -> str:
    """What a tensor is: its dtype ("float" for all of them if not ``exact``), and how it is laid out."""
    dtype = "float" if tensor.is_floating_point() and not exact else str(tensor.dtype).removeprefix("torch.")
    layout = "" if tensor.layout == torch.strided else f" {str(tensor.layout).removeprefix('torch.')}"
    return dtype + layout


def _differences(there: Method, here: Method) -> str:
    file, own = there.to_config(), here.to_config()
    keys = [key for key in {**file, **own} if file.get(key) != own.get(key)]
    return ", ".join(f"{key} is {file.get(key)!r} in the file and {own.get(key)!r} here" for key in keys)
