"""Parameter-efficient fine-tuning at home in Lightning: one callback, adapter-only checkpoints.

What needs Lightning is imported when it is asked for, so ``inject`` and the methods work without Lightning, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_peft import methods
from lightning_peft.checkpoints.inspection import AdapterSummary, inspect_adapter
from lightning_peft.checkpoints.save_load import load_adapter, save_adapter
from lightning_peft.core.method import Method
from lightning_peft.errors import PEFTError
from lightning_peft.injection.activation import activate, active, active_adapters, disabled
from lightning_peft.injection.ejection import eject
from lightning_peft.injection.inject import inject, remove
from lightning_peft.injection.inventory import AdapterInfo, adapters, rename
from lightning_peft.injection.report import Report, report
from lightning_peft.merging.combine import combine
from lightning_peft.merging.merge import merge, merged
from lightning_peft.merging.report import MergedLayer, MergeReport
from lightning_peft.methods import *  # noqa: F403
from lightning_peft.routing.route import route

if TYPE_CHECKING:
    from lightning_peft.training.callback import PEFTCallback
    from lightning_peft.training.module import PEFTModule, load_from_checkpoint

__version__ = "0.1.0"
__all__ = [
    "AdapterSummary",
    "AdapterInfo",
    "MergeReport",
    "MergedLayer",
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
