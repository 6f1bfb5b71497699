"""Adapters from a model to a directory and back.

Paths in the files are seen from the transformers model, so that an adapter trained inside a LightningModule loads into
the bare model, in peft too, and the other way round.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.checkpoints import loading
from lightning_peft.checkpoints.directory import MANIFEST, Directory, read_directory, write_directory
from lightning_peft.checkpoints.fingerprint import SAMPLES, compare, fingerprint, fingerprint_tensors
from lightning_peft.checkpoints.guard import as_checkpoint_error
from lightning_peft.checkpoints.peft.translation import fill, form_of, from_files, strip, to_files
from lightning_peft.checkpoints.tensors import fill_own, own_views
from lightning_peft.core.method import Method, Placement
from lightning_peft.errors import CheckpointError, TargetError
from lightning_peft.injection.inject import Injection, attach
from lightning_peft.injection.registry import find_adapter, registries
from lightning_peft.injection.report import Report
from lightning_peft.network.walk import below, plain_name, within

_SHORT = ("float32", "bfloat16", "float16")


@torch.no_grad()
def save_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Write the adapter ``name`` to the directory ``path``, which is made if need be.

    Where the peft package has the method, ``peft.PeftModel.from_pretrained(network, path)`` loads it; the paths in the
    files are seen from the transformers model inside ``model``, if it is one. An adapter that lies there already is
    replaced; if the writing is broken off halfway, the remaining files are refused when they are read.

    Raises:
        AdapterNameError: there is no such adapter, or one is folded into the base now.
        CheckpointError: the directory cannot be written.
        NotApplicableError: a layer was replaced after the adapter was attached to it.
    """
    _, owner, registry = find_adapter(model, name)
    registry.scopes.check_unfolded()
    registry.check_hosts(owner)
    registry.watch.check(owner)
    attachment = registry.attachments[name]
    placements = [Placement(place, adapter, part) for place, part, adapter in registry.parts(name)]
    whole = [plain_name(place) for place in attachment.fully_trained]
    found = loading.sole_network(owner)
    inward = found is not None and all(within(place, [found[0]]) for place in [*(p.path for p in placements), *whole])
    root, network = found if found and inward else ("", owner)
    placements = loading.seen_from(root, placements)
    fully_trained = [below(place, root) for place in whole]
    form = form_of(attachment.method, placements, network)
    trained: dict[str, Tensor] | None = None
    if form is None:
        tensors = {key: view.value() for key, view in own_views(placements).items()}
        # A type that peft does not know, so that it refuses the directory.
        config: dict[str, Any] = {"peft_type": f"lightning_peft.{type(attachment.method).__name__}"}
    else:
        config, tensors = to_files(form, fully_trained, network)
        if not form.exact:
            trained = {key: view.value() for key, view in own_views(loading.own_placements(placements)).items()}
    base = fingerprint(owner, root, fully_trained)
    manifest = {
        "method": attachment.method.to_config(),
        "in_transformers_model": inward,
        "in_peft_format": form is not None,
        "places": loading.places_of(placements),
        "modules_to_save": fully_trained,
        "base": {**base, "samples": _samples(base)},
    }
    write_directory(Path(path), config, tensors, manifest, trained)


def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> Report:
    """Read the adapter in the directory ``path`` and inject it into ``model`` as ``name``.

    It acts and trains beside the adapters that do already. Directories of the peft package are read too. If anything is
    wrong, the model is left as it was.

    Returns:
        A report of the adapters, the parameters that train, and the frozen ones. ``print`` shows it as a table.

    Raises:
        AdapterKeyError: a tensor is missing, left over, or has another shape.
        AdapterNameError: the name is taken, or cannot be a name.
        BaseMismatchError: the adapter was trained on another base.
        CheckpointError: there is no adapter, it is damaged or was edited, or nothing here can read it.
        PEFTError: the method does not fit the model.
    """
    for _, _, registry in registries(model):
        registry.scopes.check_unfolded()  # the base is not itself now
    injection = prepare(model, read_directory(path), name)
    if any(tensor.is_meta for placement in injection.placements for tensor in placement.adapter.state_dict().values()):
        raise CheckpointError(
            f"{type(model).__name__} is on the meta device and can hold no values: load its own first."
        )
    return attach(model, injection)


@as_checkpoint_error()
@torch.no_grad()
def prepare(model: nn.Module, directory: Directory, name: str) -> Injection:
    """Everything that loading does but for the change of ``model``: plan, check, and fill the new adapters.

    Raises:
        PEFTError: see :func:`load_adapter`.
    """
    if directory.manifest is None or directory.method is None:
        return _from_peft(model, directory, name)
    return _from_manifest(model, directory, directory.manifest, directory.method, name)


def _from_peft(model: nn.Module, directory: Directory, name: str) -> Injection:
    if str(directory.config.get("peft_type")).startswith("lightning_peft."):
        raise CheckpointError(f"{directory.path} has no {MANIFEST}, without which this method cannot be read.")
    root, network = loading.sole_network(model) or ("", model)
    method, tensors = from_files(directory.config, directory.tensors, network)
    injection = loading.plan_stored(model, method, name, directory.tensors.values())
    form = form_of(method, loading.seen_from(root, injection.placements), network)
    if form is None:
        raise CheckpointError(
            f"What peft computes with {directory.path} is not what {type(method).__name__} computes on these layers "
            "(convolutions with dilation, groups or another padding, or weights that another module reads). Merge the "
            "adapter with peft (merge_and_unload) and load the merged model."
        )
    fill(form, tensors, network, exact=False)  # many are kept in 16 bits
    return injection


def _from_manifest(
    model: nn.Module, directory: Directory, manifest: Mapping[str, Any], method: Method, name: str
) -> Injection:
    found = loading.sole_network(model) if manifest["in_transformers_model"] else ("", model)
    if found is None:
        raise CheckpointError(
            f"The adapter in {directory.path} belongs on a transformers model, and {type(model).__name__} does not "
            "hold exactly one: call this with the part that it is meant for."
        )
    (root, network), fully_trained = found, manifest["modules_to_save"]
    compare(fingerprint_tensors(model, root, fully_trained), _fingerprint(directory.path, manifest["base"]), model)
    # The base is right, so a plan that fails now fails for the file's sake.
    injection = _placed_alike(model, found, directory, manifest, method, name)
    placements = loading.seen_from(root, injection.placements)
    form = form_of(method, placements, network) if manifest["in_peft_format"] else None
    if (form is not None) != manifest["in_peft_format"]:
        raise CheckpointError(f"{directory.path / MANIFEST} says that peft has this adapter, and it has not.")
    if form is None:
        fill_own(placements, directory.tensors)
        return injection
    tensors = strip(directory.tensors)
    if not form.exact:
        # Of the method, peft's file has only what was computed from these: its fully trained modules alone are read.
        fill_own(loading.own_placements(placements), directory.trained or {})
        computed = {key for key in form.tensors if not within(key, fully_trained)}
        tensors = {key: tensor for key, tensor in tensors.items() if key not in computed}
        form = replace(form, tensors={key: view for key, view in form.tensors.items() if key not in computed})
    fill(form, tensors, network)
    return injection


def _placed_alike(
    model: nn.Module,
    found: tuple[str, nn.Module],
    directory: Directory,
    manifest: Mapping[str, Any],
    method: Method,
    name: str,
) -> Injection:
    """The stored method, planned; with every layer named where its patterns mean others in this model.

    Raises:
        CheckpointError: even so it takes other places than the file says.
    """
    (root, network), refusal = found, ""
    held = [*directory.tensors.values(), *(directory.trained or {}).values()]
    try:
        injection = loading.plan_stored(model, method, name, held)
        if not loading.differing_place(manifest["places"], loading.seen_from(root, injection.placements)):
            return injection
    except TargetError as error:  # an expression for whole names, in a model where these begin otherwise
        refusal = f" ({error})"
    if manifest["in_peft_format"]:
        named = from_files(directory.config, directory.tensors, network)[0]
        method = named if type(named) is type(method) else method
    else:
        paths = dict.fromkeys(
            place.partition(":")[0] for place in manifest["places"] if not within(place, manifest["modules_to_save"])
        )
        method = method.pointed_at(list(paths))
    if "modules_to_save" in method.field_names():
        method = replace(method, modules_to_save=manifest["modules_to_save"] or None)  # type: ignore[type-var]
    injection = loading.plan_stored(model, method, name, held)
    if other := loading.differing_place(manifest["places"], loading.seen_from(root, injection.placements)):
        raise CheckpointError(
            f"The adapter in {directory.path} has {len(manifest['places'])} places and its method finds "
            f"{len(injection.placements)} in {type(model).__name__}; they differ in '{other}'{refusal}. Load it into a "
            "model like the one it was trained in."
        )
    return injection


def _samples(base: Mapping[str, Any]) -> list[list[float]]:
    """The sampled values of a fingerprint, with no more digits than tell one fp32 number from another."""
    rows = zip(base["samples"].tolist(), base["dtypes"], strict=True)
    return [[float(f"{x:.9g}") for x in row] if dtype in _SHORT else row for row, dtype in rows]


def _fingerprint(path: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint as it was before it became JSON."""
    try:
        samples = torch.tensor(base["samples"], dtype=torch.float64).reshape(-1, SAMPLES)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: its record of the base holds no numbers.") from error
    return {**base, "samples": samples}
