"""Every error this library raises for bad input. Catch :class:`PEFTError` to catch them all.

A message says what is wrong, where (the module's path), which value, and what to do about it.
"""

import difflib
from collections.abc import Iterable


class PEFTError(Exception):
    """Base of all errors of this library."""

    def __str__(self) -> str:
        # KeyError prints repr(message); a sentence meant for a person should not be quoted.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class ConfigError(PEFTError, ValueError):
    """A field of a method or an option has a value it cannot have."""


class TargetError(PEFTError, ValueError):
    """A pattern (target, exclusion, layer, saved module) matched nothing in the model."""


class NotApplicableError(PEFTError, TypeError):
    """The method cannot work on this kind of module or model."""


class NotMergeableError(PEFTError, RuntimeError):
    """The adapter cannot be folded into the base weights."""


class AdapterNameError(PEFTError, KeyError):
    """An adapter of that name is not there, or the name is already taken, or cannot be a name."""


class CheckpointError(PEFTError, RuntimeError):
    """A file is not an adapter checkpoint that fits here."""


class AdapterKeyError(CheckpointError, KeyError):
    """Tensors are missing from, or left over in, an adapter checkpoint, or have another shape."""


class BaseMismatchError(CheckpointError, ValueError):
    """The adapter was trained on another base model."""


class OptimizerError(PEFTError, RuntimeError):
    """A parameter that is meant to train is in no optimizer."""


class GradientError(PEFTError, RuntimeError):
    """An adapter got no gradient in the first backward."""


class DataError(PEFTError, ValueError):
    """The data is not what the data module was told to expect."""


def did_you_mean(value: str, known: Iterable[str], limit: int = 3) -> str:
    """Return ``" Did you mean 'a', 'b'?"`` for the names nearest to ``value``, or an empty string."""
    names = {name.lower(): name for name in known}
    alike = [value.lower()] if value.lower() in names else None  # but for capitals it is one of them
    near = [names[name] for name in alike or difflib.get_close_matches(value.lower(), names, n=limit, cutoff=0.6)]
    return f" Did you mean {', '.join(map(repr, near))}?" if near else ""
