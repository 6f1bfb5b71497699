"""What makes a LightningModule carry adapters: when they are attached, and what its checkpoints hold.

Lightning's order (see its Trainer): callback.setup, module.setup, **configure_model**, module.on_load_checkpoint,
load_state_dict. A network may be built in any of ``__init__``, ``setup`` and ``configure_model``, so adapters are
attached at the end of ``configure_model``, the first moment when all three are over. With ``save_weights_only`` no
callback's hook runs, so the base is left out of a checkpoint in the module's own hook.
"""

from functools import cache
from typing import Any

from torch import nn

from lightning_peft.core.checkpoint import (
    RECORD,
    adapter_keys,
    attach_recorded,
    has_adapters,
    record,
)
from lightning_peft.core.injection import inject
from lightning_peft.core.method import Method
from lightning_peft.core.registry import registries, registry_of
from lightning_peft.errors import AdapterNameError, CheckpointError, PEFTError

_PENDING = "_peft_pending"


class Adapted:
    """The hooks of a LightningModule with adapters, put before the module's own class by :func:`adapt`."""

    def configure_model(self) -> None:
        """Build the network, then attach what waits."""
        super().configure_model()  # type: ignore[misc]
        attach_pending(self)  # type: ignore[arg-type]

    def on_fit_start(self) -> None:
        """Refuse to train what no checkpoint would hold."""
        super().on_fit_start()  # type: ignore[misc]
        _check_all_is_saved(self)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen base out."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if has_adapters(self):  # type: ignore[arg-type]
            _check_all_is_saved(self)  # type: ignore[arg-type]
            keys = adapter_keys(self)  # type: ignore[arg-type]
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keys}
            checkpoint[RECORD] = record(self)  # type: ignore[arg-type]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Attach what the checkpoint holds, or check that it fits what is attached."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if RECORD in checkpoint:
            attach_recorded(self, checkpoint[RECORD], checkpoint.get("state_dict", {}))  # type: ignore[arg-type]
        elif has_adapters(self):  # type: ignore[arg-type]
            raise CheckpointError(
                "This checkpoint holds no adapter; it looks like a full checkpoint of the base model. Load the base's "
                "weights where the module builds its network, and give an adapter checkpoint here; or, to continue "
                "the full model without adapters, leave PEFTCallback out (--peft.method null)."
            )

    def on_last_adapter_removed(self) -> None:
        """Be the user's own class again once everything is merged or removed."""
        self.__dict__.pop(_PENDING, None)
        if original := getattr(type(self), "_peft_original", None):
            self.__class__ = original

    def __reduce__(self) -> tuple[Any, ...]:
        # A class made at run time cannot be found by name when it is unpickled: say how to make it again.
        if original := getattr(type(self), "_peft_original", None):
            return _rebuild, (original,), self.__getstate__()
        return super().__reduce__()  # type: ignore[return-value]


def adapted_class(cls: type) -> type:
    """The subclass of a LightningModule class whose instances carry adapters; the class itself if it does already."""
    return cls if issubclass(cls, Adapted) else _subclass(cls)  # type: ignore[arg-type]  # classes are hashable


@cache
def _subclass(cls: Any) -> type:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (Adapted, cls), {**names, "_peft_original": cls})


def adapt(module: nn.Module, name: str, method: Method) -> None:
    """Make ``module`` carry adapters, and let ``method`` wait until its network is built."""
    module.__class__ = adapted_class(type(module))
    module.__dict__[_PENDING] = {**module.__dict__.get(_PENDING, {}), name: method}


def attach_pending(module: nn.Module) -> None:
    """Attach the methods that wait. Attached ones are left as they are, so every stage may call this.

    Raises:
        AdapterNameError: another method is attached under that name.
        PEFTError: the network was built anew, so trained adapters would be lost.
    """
    for path, owner, registry in registries(module):
        for host, slots in registry.slots.items():
            if _submodule(owner, f"{host}.peft" if host else "peft") is not slots:
                raise PEFTError(
                    f"{type(module).__name__} built '{path or host}' anew after its adapters were attached, and would "
                    "lose them. Build the network once: begin setup() or configure_model() with a check whether it is "
                    "there."
                )
    own = registry_of(module)
    for name, method in module.__dict__.get(_PENDING, {}).items():
        present = own.attachments.get(name) if own else None
        if present is None:
            inject(module, method, name)
        elif present.method.to_config() != method.to_config():
            raise AdapterNameError(
                f"{type(module).__name__} has an adapter {name!r} already, {present.method}, and PEFTCallback asks for "
                f"{method}. Give the new one another name, or remove(model, {name!r}) first."
            )


def _check_all_is_saved(module: nn.Module) -> None:
    if not has_adapters(module):
        return
    keys = adapter_keys(module)
    lost = [name for name, p in module.named_parameters() if p.requires_grad and name not in keys]
    if lost:
        raise PEFTError(
            f"{len(lost)} parameters train that belong to no adapter, first '{lost[0]}': an adapter checkpoint would "
            f"lose them. Inject on {type(module).__name__} itself, which freezes all of it, and name what is to be "
            "trained whole in modules_to_save; nothing may unfreeze the base afterwards."
        )


def _submodule(owner: nn.Module, path: str) -> nn.Module | None:
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None


def _rebuild(cls: type) -> Any:
    adapted: Any = adapted_class(cls)
    return adapted.__new__(adapted)
