"""Parameter-efficient fine-tuning at home in Lightning: one callback, adapter-only checkpoints.

What needs Lightning is imported when it is asked for, so ``inject`` and the methods work without Lightning, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_peft import methods
from lightning_peft.core.activation import activate, active, active_adapters, disabled
from lightning_peft.core.combining import combine
from lightning_peft.core.ejection import eject
from lightning_peft.core.injection import inject, remove
from lightning_peft.core.inspection import AdapterSummary, inspect_adapter
from lightning_peft.core.inventory import AdapterInfo, adapters, rename
from lightning_peft.core.merging import merge, merged
from lightning_peft.core.method import Method
from lightning_peft.core.report import Report, report
from lightning_peft.core.routing import route
from lightning_peft.core.transfer import load_adapter, save_adapter
from lightning_peft.errors import PEFTError
from lightning_peft.methods import *  # noqa: F403

if TYPE_CHECKING:
    from lightning_peft.training.callback import PEFTCallback
    from lightning_peft.training.module import PEFTModule, load_from_checkpoint

__version__ = "0.1.0"
__all__ = [
    "AdapterSummary",
    "AdapterInfo",
    "Method",
    "PEFTCallback",
    "PEFTError",
    "PEFTModule",
    "Report",
    "activate",
    "active",
    "active_adapters",
    "adapters",
    "combine",
    "disabled",
    "eject",
    "inject",
    "inspect_adapter",
    "load_adapter",
    "load_from_checkpoint",
    "merge",
    "merged",
    "methods",
    "remove",
    "rename",
    "report",
    "route",
    "save_adapter",
    *methods.__all__,
]

_LATER = {
    "PEFTCallback": "lightning_peft.training.callback",
    "PEFTModule": "lightning_peft.training.module",
    "load_from_checkpoint": "lightning_peft.training.module",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
