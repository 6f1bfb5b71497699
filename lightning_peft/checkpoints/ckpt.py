"""The adapter's part of a checkpoint: its tensors, and the record that lets it be attached and checked again."""

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_peft.checkpoints.fingerprint import check_base, check_own_base, fingerprint
from lightning_peft.checkpoints.guard import as_checkpoint_error
from lightning_peft.checkpoints.loading import plan_stored, seen_from
from lightning_peft.checkpoints.tensors import TensorView, check_tensors, fill_own, own_views, view_of
from lightning_peft.components.modules_to_save import resolve_modules_to_save
from lightning_peft.components.tuned import TunedParameters
from lightning_peft.core.method import Method, Placement
from lightning_peft.errors import AdapterNameError, CheckpointError
from lightning_peft.injection.inject import Injection, attach
from lightning_peft.injection.names import owner_of
from lightning_peft.injection.registry import registries
from lightning_peft.network.walk import join, outermost, plain_name

METADATA_KEY = "lightning_peft"
"""The key of a ``.ckpt`` under which the record lies."""
METADATA_VERSION = 1
Entries = dict[tuple[str, str], Method]
"""The methods of a record's adapters, by path and name."""


def adapter_keys(model: nn.Module) -> frozenset[str]:
    """The state-dict keys of every adapter at or below ``model``."""
    return frozenset(join(path, key) for path, _, registry in registries(model) for key in registry.own_keys())


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of every adapter at or below ``model``, by state-dict key without what torch.compile puts in."""
    keys = adapter_keys(model)
    return {plain_name(key): tensor for key, tensor in model.state_dict().items() if key in keys}


def metadata(model: nn.Module) -> dict[str, Any]:
    """Describe the adapters at or below ``model`` and their base, in primitives and tensors.

    Raises:
        AdapterNameError: an adapter is folded into the base now.
        NotApplicableError: a layer was replaced after an adapter was attached to it.
    """
    for _, owner, registry in registries(model):
        registry.scopes.check_unfolded()
        registry.check_hosts(owner)
    adapters = {
        f"{path}:{name}": {"path": path, "name": name, "method": attachment.method.to_config()}
        for path, registry in ((plain_name(path), registry) for path, _, registry in registries(model))
        for name, attachment in registry.attachments.items()
    }
    return {"version": METADATA_VERSION, "adapters": adapters, "base": fingerprint(model)}


def attach_metadata(
    model: nn.Module, metadata: Any, state: Mapping[str, Any], waiting: Mapping[str, Method | None] | None = None
) -> None:
    """Attach the adapters of a checkpoint's metadata, or check that the attached ones are the same and ``state`` fits.

    Nothing is loaded yet. If anything is wrong, the model is left as it was. A ``state`` that holds the base as well
    (all of it) fits any base of these shapes.

    Args:
        model: the network, with or without adapters.
        metadata: the record.
        state: the tensors beside it.
        waiting: adapters of the whole ``model`` that the file must hold, by name; None for any method.

    Raises:
        AdapterKeyError: a tensor of ``state`` is missing, left over, or of another shape or kind.
        BaseMismatchError: the adapters were trained on another base.
        CheckpointError: the record is damaged, of a newer version, or describes other adapters than those attached or
            ``waiting``.
    """
    for owner, injection in _plan(model, metadata, state, waiting or {}):
        attach(owner, injection)


@as_checkpoint_error()
def _plan(
    model: nn.Module, metadata: Any, state: Mapping[str, Any], waiting: Mapping[str, Method | None]
) -> list[tuple[nn.Module, Injection]]:
    """The adapters to attach, checked, each with the module that it is injected on. The model is only read."""
    entries = methods_in(metadata)
    modules = {plain_name(path): module for path, module in model.named_modules()}
    attached = {
        (plain_name(path), name): a.method for path, _, r in registries(model) for name, a in r.attachments.items()
    }
    _check_entries(model, entries, {("", name): m for name, m in waiting.items()} | attached, modules.keys())
    _check_mapping(state)
    full = not base_keys(model).isdisjoint(state)
    if not full:
        # Their own values in the base are never read, and differ wherever a head starts at random.
        fully_trained = [
            join(path, top)
            for (path, _), method in entries.items()
            for top in resolve_modules_to_save(modules[path], method.modules_to_save)
        ]
        check_base(model, metadata.get("base"), fully_trained)
    views = _views(model, full)
    # Every adapter is planned before one is attached, so that a refusal has nothing to undo.
    planned: list[tuple[nn.Module, Injection]] = []
    for (path, name), method in entries.items():
        if (path, name) in attached:
            continue
        try:
            injection = plan_stored(modules[path], method, name, state.values())
        except AdapterNameError as error:
            raise _damaged(error) from error
        planned.append((modules[path], injection))
        views |= _planned_views(model, modules[path], injection)
    # The extra state of a module is whatever it wants.
    others = {plain_name(k) for k, v in model.state_dict(keep_vars=True).items() if not isinstance(v, Tensor)}
    check_tensors(views, {k: v for k, v in state.items() if k not in others}, of="" if full else "adapter ")
    if full and metadata.get("base"):
        check_own_base(state, metadata["base"])
    return planned


def _check_entries(
    model: nn.Module, entries: Entries, expected: Mapping[tuple[str, str], Method | None], modules: Set[str]
) -> None:
    """Raise unless ``entries`` are the ``expected`` adapters, and others that belong on modules of ``model``."""
    if missing := [name for path, name in expected if (path, name) not in entries]:
        raise CheckpointError(
            f"The file holds no adapter {missing[0]!r}; it holds {', '.join(repr(name) for _, name in entries)}. "
            "Use the adapter names that the file was written with."
        )
    for (path, name), method in entries.items():
        if (present := expected.get((path, name))) and present.to_config() != method.to_config():
            raise CheckpointError(f"Adapter {name!r} of the file is another one: {_differences(method, present)}.")
        if path not in modules:
            raise CheckpointError(
                f"The file's adapter {name!r} belongs on '{path}', and {type(model).__name__} has no such module. "
                "Load it into the class it was trained in."
            )
    # Planning would not notice: it asks for what is attached already, and none of these need be.
    owners = {path for path, _ in entries}
    if nested := sorted(owners.difference(outermost(owners))):
        raise _damaged(
            f"'{nested[0]}' is inside of another module with adapters of its own. All adapters of a network are "
            "injected on the same module."
        )


def _views(model: nn.Module, full: bool) -> dict[str, TensorView]:
    """The tensors of the adapters of ``model`` by their names in files; the base's own too if ``full``."""
    own = adapter_keys(model)
    copied = {id(b) for m in model.modules() if isinstance(m, TunedParameters) for b in m.buffers()}
    return {
        plain_name(key): view_of(tensor, id(tensor) in copied)
        if key in own
        else TensorView((tensor,), trained=False, finite=False)
        for key, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and (full or key in own)
    }


def _planned_views(model: nn.Module, owner: nn.Module, injection: Injection) -> dict[str, TensorView]:
    """The tensors that ``injection`` adds, by the names that files have for them."""
    planned: dict[int, list[Placement]] = {}
    for placement in injection.placements:
        planned.setdefault(id(owner.get_submodule(placement.path)), []).append(placement)
    named = model.named_modules(remove_duplicate=False)  # a module that is used twice has two names
    placements = [replace(p, path=plain_name(path)) for path, module in named for p in planned.get(id(module), ())]
    return own_views(placements, injection.name)


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
    method = entries[source]
    # As everywhere, the base first: a plan that fails now fails for the file's sake.
    check_base(model, metadata.get("base"), resolve_modules_to_save(model, method.modules_to_save))
    injection = plan_stored(model, method, name, state.values())
    found = {key: value for key, value in state.items() if (owner := owner_of(key)) and owner[1] == source}
    fill_own(seen_from("", injection.placements), found, source)
    return injection


def methods_in(metadata: Any) -> Entries:
    """The methods that a record describes, by the path and the name of their adapters.

    Raises:
        CheckpointError: the record is damaged, or of a newer version.
        ConfigError: it names an unknown method, or a field has a value it cannot have.
    """
    if not isinstance(metadata, Mapping) or type(metadata.get("version")) is not int or metadata["version"] < 1:
        raise _damaged(f"{type(metadata).__name__} without a version.")
    if metadata["version"] > METADATA_VERSION:
        raise CheckpointError(
            f"The file was written by a newer lightning_peft (record version {metadata['version']}; this one reads up "
            f"to {METADATA_VERSION}). Upgrade lightning_peft."
        )
    try:
        entries = [(entry["path"], entry["name"], entry["method"]) for entry in metadata["adapters"].values()]
    except (AttributeError, KeyError, TypeError) as error:
        raise _damaged(f"{error!r}.") from error
    # Told here: a list would fail as a key below, and a number only where paths are joined.
    for path, name, _ in entries:
        if not isinstance(path, str) or not isinstance(name, str):
            raise _damaged(f"adapter {name!r} on {path!r}.")
    return {(path, name): Method.from_config(method) for path, name, method in entries}


def has_adapters(model: nn.Module) -> bool:
    """True if anything was injected on ``model`` itself or below."""
    return bool(registries(model))


def base_keys(model: nn.Module) -> set[str]:
    """The state-dict keys of ``model`` that belong to no adapter, without what torch.compile puts in."""
    return {plain_name(key) for key in model.state_dict(keep_vars=True).keys() - adapter_keys(model)}


def _damaged(what: object) -> CheckpointError:
    return CheckpointError(f"The '{METADATA_KEY}' record of this file is damaged: {what}")


def _check_mapping(state: Any) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError("The 'state_dict' of this file is damaged: it is no mapping from names to tensors.")


def _differences(there: Method, here: Method) -> str:
    file, own = there.to_config(), here.to_config()
    keys = [key for key in {**file, **own} if file.get(key) != own.get(key)]
    return ", ".join(f"{key} is {file.get(key)!r} in the file and {own.get(key)!r} here" for key in keys)
