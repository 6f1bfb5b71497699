"""An adapter as peft has it, and a file of peft's as it was read."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_peft.checkpoints.tensors import TensorView
from lightning_peft.errors import BaseMismatchError, CheckpointError
from lightning_peft.network.patterns import matches_end
from lightning_peft.network.walk import base_modules

PROMPT = "prompt_embeddings"
"""The key, without any prefix, of everything that peft calls prompt learning."""
CONFIG = "adapter_config.json"
PEFT_VERSION = "0.21.0"  # the release that files are written for: some types mean something else before it
T = TypeVar("T")

# Fields of every config that say nothing about what the adapter computes, or that the translation itself reads.
_NEUTRAL = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
)  # fmt: skip
_UNSET: tuple[Any, ...] = (None, False, "", 0, "none", [], {}, ())


@dataclass(frozen=True, kw_only=True)
class PeftState:
    """An adapter as peft has it, all paths as seen from the network that peft would wrap."""

    config: dict[str, Any]
    """``peft_type`` and the fields of that type; what every type has is added when the file is written."""
    tensors: dict[str, TensorView]
    """By path in the network and peft's own name, such as ``encoder.0.query.lora_A.weight``; of what peft keeps on its
    wrapper the names begin with a colon."""
    exact: bool = True
    """True if training can go on from these tensors; if not, they are computed, and never filled."""


@dataclass(frozen=True, kw_only=True)
class PeftFile:
    """A PEFT directory as read, for the method that its ``peft_type`` belongs to."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    """Without peft's prefix of the keys, and without the modules that were fully trained."""
    model: nn.Module
    """The network that the paths are seen from."""

    def check_fields(self, *known: str) -> None:
        """Raise where a field that the method does not know is set to something.

        Raises:
            CheckpointError: names the field.
        """
        for name, value in self.config.items():
            if name not in (*_NEUTRAL, *known) and value not in _UNSET:
                raise self.unsupported(name)

    def unsupported(self, name: str) -> CheckpointError:
        """The error for a field whose value has no counterpart here."""
        return CheckpointError(
            f"{CONFIG}: {name}={self.config[name]!r} of a {self.config['peft_type']} adapter has no counterpart here, "
            "and without it the outputs would differ. Merge the adapter with peft (merge_and_unload) and load the "
            f"merged model, or train without {name}."
        )

    def number(self, name: str, default: float) -> float:
        """A number of the config."""
        return self._typed(name, default, (int, float), "a number")  # type: ignore[no-any-return]

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number of the config; without a default it has to be there."""
        return self._typed(name, default, (int,), "a whole number")  # type: ignore[no-any-return]

    def flag(self, name: str) -> bool:
        """True if a switch of the config is on; one that is not there is off."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{CONFIG}: {name} must be true or false, not {value!r}.")
        return bool(value)

    def patterns(self, name: str) -> dict[str, Any]:
        """A mapping of the config from patterns, for the ends of layer names, to numbers."""
        value = self.config.get(name) or {}
        try:
            if all(re.compile(key) and type(number) in (int, float) for key, number in value.items()):
                return dict(value)
        except (AttributeError, TypeError, re.error):
            pass
        raise CheckpointError(f"{CONFIG}: {name} must map patterns for layers to numbers, not {value!r}.")

    def hosts(self, *names: str) -> dict[str, Tensor]:
        """The tensors of peft's ``names``, such as ``"lora_A.weight"``, by the path of the layer that they belong to.

        Raises:
            BaseMismatchError: the network has no such layer.
            CheckpointError: there is none.
        """
        found = {key[: -len(n) - 1]: t for key, t in self.tensors.items() for n in names if key.endswith(f".{n}")}
        if not found:
            raise CheckpointError(f"The file holds no tensor called {' or '.join(map(repr, names))}: it is incomplete.")
        if foreign := [*found.keys() - {path for path, _ in base_modules(self.model)}]:
            raise BaseMismatchError(
                f"The adapter belongs to another base: the file has tensors for '{min(foreign)}', which "
                f"{type(self.model).__name__} does not have. Load the base model that the adapter was trained on."
            )
        return found

    def prompt(self) -> tuple[Tensor, int]:
        """The learned vectors and how many there are."""
        if PROMPT not in self.tensors or self.tensors[PROMPT].dim() != 2:
            raise CheckpointError(f"The file holds no matrix '{PROMPT}': it is incomplete.")
        return self.tensors[PROMPT], self.whole("num_virtual_tokens")

    def _typed(self, name: str, default: Any, types: tuple[type, ...], what: str) -> Any:
        value: Any = self.config.get(name, default)
        if type(value) not in types or not math.isfinite(value):
            raise CheckpointError(f"{CONFIG}: {name} must be {what}, not {value!r}.")
        return value


def sizes(model: nn.Module) -> dict[str, int]:
    """Layers and heads of a transformers model, which peft wants to know for every prompt and does not always find."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {
        "num_layers": getattr(text, "num_hidden_layers", None),
        "num_attention_heads": getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None),
    }
    return {name: value for name, value in found.items() if isinstance(value, int)}


def listed(config: Mapping[str, Any], name: str) -> list[str]:
    """A field of a config that takes one string, several or none.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(name)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise CheckpointError(f"{CONFIG}: {name} must be a string, a list of them, or null, not {value!r}.")
    return values


def exact_targets(names: Iterable[str], model: nn.Module) -> list[str] | str:
    """What peft's ``target_modules`` has to be for exactly the modules ``names`` to match."""
    names = list(names)
    paths = [path for path, _ in base_modules(model)]
    if all(path in names or not any(path.endswith(f".{name}") for name in names) for path in paths):
        return names
    return "|".join(map(re.escape, names))  # whole names: a list also takes what ends in one of its names


def exact_names(names: Iterable[str], model: nn.Module) -> list[str]:
    """What our own ``target_modules`` has to be for exactly the modules ``names`` to match."""
    targets = exact_targets(names, model)
    return targets if isinstance(targets, list) else [f"^{re.escape(name)}$" for name in names]


def exceptions(values: Mapping[str, T]) -> tuple[T, dict[str, T]]:
    """The most frequent of the ``values`` of layers, and a pattern for the name of each layer with another one."""
    common = Counter(values.values()).most_common(1)[0][0]
    # The first match counts, in peft too: "block.fc" has to be asked before "fc", which matches both.
    others = sorted((name for name, value in values.items() if value != common), key=len, reverse=True)
    patterns = {re.escape(name): values[name] for name in others}
    if all(next((v for p, v in patterns.items() if matches_end(p, n)), common) == v for n, v in values.items()):
        return common, patterns
    return common, {re.escape(name): values[name] for name in sorted(values, key=len, reverse=True)}
