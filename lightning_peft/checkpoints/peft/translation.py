"""An adapter as a directory of the peft package: what every method has in common there.

Everything peculiar to a method is in its :class:`~.formats.PeftFormat`. Here are the key prefixes, the modules that are
fully trained, the task, and what peft does to a model without being told.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_peft.checkpoints.loading import own_placements
from lightning_peft.checkpoints.peft.formats import PeftFormat, format_of
from lightning_peft.checkpoints.peft.state import CONFIG, PEFT_VERSION, PROMPT, PeftFile, PeftState, listed
from lightning_peft.checkpoints.tensors import check_tensors, view_of
from lightning_peft.components.tuned import FullyTrainedParameters
from lightning_peft.core.method import Method, Placement, registered_methods
from lightning_peft.errors import AdapterKeyError, BaseMismatchError, CheckpointError, did_you_mean
from lightning_peft.network.patterns import ends_with
from lightning_peft.network.walk import base_modules, join, outermost, within

# transformers calls its models after their task, and peft has a class for some of the tasks.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_WRAPPER = "base_model."
# Modules that peft trains whole for a task, without being told.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def form_of(method: Method, placements: Sequence[Placement], model: nn.Module) -> PeftState | None:
    """How peft has an adapter, fully trained modules included; None where it cannot.

    Args:
        method: the adapter's.
        placements: all of its adapters, at their places in ``model``.
        model: the network that peft would wrap.
    """
    own = own_placements(placements)
    written = format_of(type(method))
    form = written.to_peft(method, own, model) if written and own else None
    if form is None or any(key.startswith(".") for key in form.tensors):  # the network itself is the adapted layer
        return None
    fully_trained = {
        join(placement.path, name): view_of(copy, copied=True)
        for placement in placements
        if isinstance(placement.adapter, FullyTrainedParameters)
        for name, copy in placement.adapter.copies().items()
    }
    return replace(form, tensors={**form.tensors, **fully_trained})


def to_files(
    form: PeftState, fully_trained: Sequence[str], model: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a PEFT directory.

    Args:
        form: from :func:`form_of`.
        fully_trained: paths of the modules that are fully trained.
        model: the network that peft would wrap.
    """
    prefix, prompt = _prefix(form.tensors), PROMPT in form.tensors
    tensors = {_key(key, prefix): tensor.value() for key, tensor in form.tensors.items()}
    task, names = _task(model, prompt), sorted(fully_trained)
    # What peft takes along beside these by its own account, and whose values it then wants.
    taken = wrapped((*names, *_HEADS.get(task or "", ())), model)
    beside = [path for path in taken if not within(path, fully_trained)]
    if any(within(key, beside) for key in form.tensors):  # peft would train whole what carries an adapter
        task, names = "FEATURE_EXTRACTION" if prompt else None, [prefix + path for path in names]
        beside = []
    own = {key: tensor for key, tensor in base_state(model).items() if within(key, beside)}
    tensors |= {prefix + key: tensor.detach().cpu().clone() for key, tensor in own.items()}
    config = {
        **form.config,
        "task_type": task,
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
        "modules_to_save": names or None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
    }
    return config, tensors


def from_files(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[Method, dict[str, Tensor]]:
    """The method that a PEFT directory describes, and its tensors by the keys of :class:`PeftState`.

    Raises:
        AdapterKeyError: a key is none of peft's.
        BaseMismatchError: the adapter was made for layers that ``model`` does not have.
        CheckpointError: the method, or a field of it, has no counterpart here.
    """
    reader = _reader(config)
    stripped = strip(tensors)
    names = [*listed(config, "modules_to_save"), *_HEADS.get(str(config.get("task_type")), ())]
    state, tops = base_state(model), wrapped(names, model)
    whole = {key: top for top in tops for key in stripped if key in state and within(key, [top])}
    file = PeftFile(config=config, tensors={k: t for k, t in stripped.items() if k not in whole}, model=model)
    method, read = reader.from_peft(file)
    _check_targets(config, read, [*whole.values()], model)
    method = replace(method, modules_to_save=sorted({*whole.values()}) or None)  # type: ignore[type-var]
    return method, {**read, **{key: stripped[key] for key in whole}}


def _reader(config: Mapping[str, Any]) -> PeftFormat:
    """The format that reads a file with this config: of all whose marks it has, the one with the most marks."""
    kind = config.get("peft_type")
    every = [form for method in registered_methods() if (form := format_of(method))]
    known = {name for form in every for name in form.types}
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(
            f"{CONFIG}: peft_type={kind!r} has no counterpart here; known are {', '.join(sorted(known))}."
            f"{did_you_mean(str(kind), known)} Merge the adapter with peft (merge_and_unload) and load that model."
        )
    # Compared with their types: to Python, 1 is True.
    fitting = [
        form
        for form in every
        if kind in form.types
        and all((type(v), v) == (type(config.get(name)), config.get(name)) for name, v in form.table.marks.items())
    ]
    if not fitting:
        raise CheckpointError(f"{CONFIG}: no method here reads this kind of {kind} adapter.")
    return max(fitting, key=lambda form: len(form.table.marks))


def strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a PEFT directory by the keys of :class:`PeftState`.

    Raises:
        AdapterKeyError: a key is none of peft's.
    """
    prefix = _prefix(tensors)
    if foreign := sorted(key for key in tensors if key != PROMPT and not key.startswith((prefix, _WRAPPER))):
        raise AdapterKeyError(f"'{foreign[0]}' is no key of peft's: it does not begin with '{prefix}'.")
    return {_stripped(key, prefix): tensor for key, tensor in tensors.items()}


def _key(key: str, prefix: str) -> str:
    """What peft calls the tensor with this key of a :class:`PeftState`."""
    return key if key == PROMPT else _WRAPPER + key[1:] if key.startswith(":") else prefix + key


def _stripped(key: str, prefix: str) -> str:
    """The other way round."""
    return key.removeprefix(prefix) if key == PROMPT or key.startswith(prefix) else f":{key.removeprefix(_WRAPPER)}"


def fill(form: PeftState, tensors: Mapping[str, Tensor], model: nn.Module, exact: bool = True) -> None:
    """Put the tensors of a PEFT directory into the adapters of ``form``.

    Args:
        form: the adapter to fill.
        tensors: the tensors of the file.
        model: the network that peft would wrap.
        exact: True if parameters must have the very dtype that they have here, as in files that we wrote.

    Raises:
        AdapterKeyError: a tensor is missing, left over, or has another shape or kind; nothing is changed then.
        CheckpointError: a parameter has values that are no numbers.
    """
    check_tensors(form.tensors, tensors, exact=exact, base=base_state(model))
    for key, tensor in form.tensors.items():
        tensor.fill(tensors[key])


def wrapped(names: Iterable[str], model: nn.Module) -> list[str]:
    """Paths of the modules that peft trains whole for these ``modules_to_save``; it asks for no dot before a name."""
    ends = tuple(names)
    if not ends:
        return []
    return outermost([path for path, _ in base_modules(model) if path and f"{_WRAPPER}model.{path}".endswith(ends)])


def _check_targets(
    config: Mapping[str, Any], keys: Iterable[str], fully_trained: Sequence[str], model: nn.Module
) -> None:
    """Raise where the config means a layer that the file has nothing for, as on a base with more layers.

    Raises:
        BaseMismatchError: names the layer.
        CheckpointError: a field has a value it cannot have.
    """
    if config.get("target_modules") == "all-linear":
        return
    paths = [path for path, module in base_modules(model) if any(True for _ in module.parameters(recurse=False))]
    indices, containers = config.get("layers_to_transform"), listed(config, "layers_pattern")
    indices = [indices] if type(indices) is int else indices
    if not (indices is None or (isinstance(indices, list) and all(type(index) is int for index in indices))):
        raise CheckpointError(f"{CONFIG}: layers_to_transform must be a list of indices, not {indices!r}.")
    # Patterns of a file are regular expressions that anybody may have written.
    try:
        meant = _match(config, "target_modules", paths) - _match(config, "exclude_modules", paths)
        if indices:
            meant = {path for path in meant if _layer(path, containers) in indices}
    except re.error as error:
        raise CheckpointError(f"{CONFIG}: a pattern is no regular expression ({error}).") from error
    with_tensors = {path for path in meant if any(within(key, [path]) for key in keys)}
    if lacking := sorted(path for path in meant - with_tensors if not within(path, fully_trained)):
        raise BaseMismatchError(
            f"{CONFIG}: target_modules means '{lacking[0]}' too, and the file has no tensors for it. The adapter was "
            "trained on another base, with fewer layers, or is incomplete."
        )


def _match(config: Mapping[str, Any], name: str, paths: Iterable[str]) -> set[str]:
    """The ``paths`` that a field means: one regular expression, or names and suffixes."""
    patterns = listed(config, name)
    if isinstance(config.get(name), str):
        return {path for path in paths if re.fullmatch(patterns[0], path)}
    return {path for path in paths for end in patterns if ends_with(path, end)}


def _layer(path: str, containers: Sequence[str]) -> int | None:
    """The index that peft takes for the layer's."""
    for name in containers or [r"[^.]*"]:
        if match := re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path):
            return int(match[1])
    return None


def _prefix(keys: Iterable[str]) -> str:
    """What peft puts before the path of a module: it wraps a model once for a prompt, else twice."""
    return _WRAPPER if PROMPT in keys else f"{_WRAPPER}model."


def _task(model: Any, prompt: bool) -> str | None:
    """The task of a transformers model, by which peft chooses what to do with a prompt."""
    if not hasattr(model, "can_generate"):
        return None
    named = (task for cls in type(model).__mro__ for end, task in _TASKS.items() if cls.__name__.endswith(end))
    if task := next(named, None):
        return task
    if model.can_generate():
        return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if prompt else None


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base's own parameters and saved buffers, by path."""
    state: dict[str, Tensor] = {}
    for path, module in base_modules(model):
        saved = {n: t for n, t in module._buffers.items() if n not in module._non_persistent_buffers_set}
        state |= {join(path, n): t for n, t in {**module._parameters, **saved}.items() if t is not None}
    return state
