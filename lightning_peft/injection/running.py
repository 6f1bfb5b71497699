"""Layers that carry adapters and do not run, so that the adapters do nothing.

Nothing of that can be told when adapters are attached: a model may go another way (a fused layer in place of three), or
read a layer's weight where no source shows it. The first whole forward tells, and again the first one after a module
beside an adapted layer has come or gone.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_peft.errors import NotApplicableError
from lightning_peft.injection.registry import Registry
from lightning_peft.injection.slots import AdapterSlots
from lightning_peft.network.walk import CHILD, has_parameters, join, leaf, module_at, parent, starred, within

_is_compiling = torch.compiler.is_dynamo_compiling


class RunWatch:
    """Watches a model's forwards until all of its adapted layers have run, and looks whether the model has changed."""

    def __init__(self, owner: nn.Module, registry: Registry) -> None:
        self.registry = registry
        self._open, self._warned = False, False  # whether something is yet to be told, and was told
        self._passed = False  # whether a whole forward has run since
        self._judged: set[str] = set()  # the adapters that have acted by then
        self._parents: list[tuple[nn.Module, int]] = []  # what holds adapted layers, with its number of children
        self._children: list[tuple[str, set[str]]] = []  # the paths of these, and the names of the children
        self._grown: dict[str, str] = {}  # of these, what has got a new child since, and its name
        registry.handles.append(owner.register_forward_pre_hook(self._begin))
        registry.handles.append(owner.register_forward_hook(self._end))

    def start(self, owner: nn.Module) -> None:
        """Watch anew: adapters were attached, or the model has changed."""
        for slots in self.registry.slots.values():
            vars(slots)["ran"] = False
        paths = {parent(path) for path in self.registry.slots}
        # What is beside a layer of the model itself, such as another head, does not stand for that layer.
        found = [(path, module) for path in paths if path and (module := module_at(owner, path)) is not None]
        self._parents = [(module, len(module._modules)) for _, module in found]
        self._children = [(path, set(module._modules)) for path, module in found]
        self._open, self._passed = True, False

    def check(self, owner: nn.Module) -> None:
        """Raise if a new layer runs in place of adapted ones, or may do so.

        Raises:
            NotApplicableError: says which.
        """
        self._look(owner)
        slots = self.registry.slots
        for path, name in list(self._grown.items()):
            beside = [p for p, own in slots.items() if parent(p) == path and _learned(own, self.registry.attachments)]
            idle = [p for p in beside if not slots[p].ran]
            if not idle or module_at(owner, join(path, name)) is None:  # it stands for none of them, or is gone
                del self._grown[path]
                continue
            has = f"'{path}', which holds adapted layers, has got '{name}' since adapters were attached"
            if not self._passed and not any(own.ran for own in slots.values()):
                raise NotApplicableError(
                    f"{has} (as fuse_qkv_projections of diffusers does it), and may run that in their place. Undo it; "
                    "or run one batch, which shows whether they still run, and try again."
                )
            raise NotApplicableError(
                f"{has}, and {len(idle)} of them have not run since, first '{idle[0]}'. Adapters do nothing there, and "
                "would do something once they are in the weights. Undo what has replaced these layers, or load the "
                "adapter into a fresh model."
            )

    def judge_if_open(self, owner: nn.Module) -> None:
        """See which layers have run, now that a whole forward is done, if that is open; warn once if some have not."""
        acting = self.registry.acting()
        if acting and (self._open or not self._judged.issuperset(acting)):
            self._judge(owner, acting)

    def _judge(self, owner: nn.Module, acting: tuple[str, ...]) -> None:
        slots = self.registry.slots
        ran = [path for path, own in slots.items() if own.ran or not path]
        # Of experts, and of blocks that are dropped, some run each time; a tied copy acts where its twin does.
        alike = {starred(path) for path in ran}
        learned = {id(p) for path in ran for p in _learned(slots[path], acting)}
        unseen = _compiled(owner)
        idle = [
            path
            for path, own in slots.items()
            if path not in ran and (_is_passed(path, ran) or starred(path) not in alike)
            if id(module_at(owner, path)) not in unseen
            if any(id(p) not in learned for p in _learned(own, acting))
        ]
        self._open = bool(idle)
        self._judged |= {*acting}
        if idle and not self._warned:
            self._warned = True
            warnings.warn(
                f"Adapted layers that have not run in a forward of {type(owner).__name__}: {len(idle)}, first "
                f"'{idle[0]}'. Adapters do nothing there: leave these out (exclude_modules), unless they run for other "
                "inputs, or elsewhere.",
                stacklevel=2,
            )

    def _look(self, owner: nn.Module) -> None:
        """Note what has come beside adapted layers."""
        if not any(len(module._modules) != number for module, number in self._parents):
            return
        for (module, _), (path, before) in zip(self._parents, self._children, strict=True):
            new = module._modules.keys() - before - {CHILD}
            own = [name for name in new if (child := module._modules[name]) is not None and has_parameters(child)]
            if own:
                self._grown[path] = min(own)
        self.start(owner)

    def _begin(self, owner: nn.Module, args: Any) -> None:
        if not _is_compiling():
            self.registry.scopes.begin_forward()
            self._look(owner)

    def _end(self, owner: nn.Module, args: Any, output: Any) -> None:
        if _is_compiling():
            return
        self.registry.scopes.end_forward(output)
        # The forward of a LightningModule need not be all that it does; whoever runs its steps asks then.
        if not hasattr(owner, "training_step"):
            self._passed = True
            self.judge_if_open(owner)


def _is_passed(path: str, ran: list[str]) -> bool:
    """True if what holds a layer has run without it: a layer beside it did. One of a list need not be what runs."""
    return bool(parent(path)) and not leaf(path).isdigit() and any(within(other, [parent(path)]) for other in ran)


def _learned(slots: AdapterSlots, acting: Iterable[str]) -> list[nn.Parameter]:
    """What is learned at a layer; parts that hand on what others need have nothing."""
    return [p for name in acting for adapter in slots.parts(name).values() for p in adapter.parameters()]


def _compiled(owner: nn.Module) -> set[int]:
    """The modules, by their ids, that run as compiled code, which notes nothing."""
    tops = [
        module for module in owner.modules() if "_orig_mod" in module._modules or module._compiled_call_impl is not None
    ]
    return {id(module) for top in tops for module in top.modules()}
