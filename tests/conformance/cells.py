"""One cell of the contract's table: a method on a host."""

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import perturbation
import pytest
import torch
from conformance.hosts import HOSTS, Host
from torch import Tensor, nn

from lightning_peft import inject
from lightning_peft.core.method import Method, registered_methods
from lightning_peft.errors import NotApplicableError, TargetError
from lightning_peft.injection.inject import plan_injection

EXAMPLE = Path(__file__).parents[2] / "examples" / "first_method.py"


@cache
def methods() -> list[type[Method]]:
    """The library's methods and the example's, or those of the one file that is asked for."""
    asked = os.environ.get("METHOD")
    own = _imported(Path(asked) if asked else EXAMPLE)
    rooms = (own.__name__,) if asked else (own.__name__, "lightning_peft.")
    # Methods that other tests define for their own ends are no part of the library.
    found = [method for method in registered_methods() if method.__module__.startswith(rooms)]
    if not found:
        raise pytest.UsageError(
            f"{asked} has no method: no concrete subclass of lightning_peft.Method is defined in it. One that lacks a "
            "method of its base, such as build, is no concrete one."
        )
    return found


@cache
def cells() -> list["Cell"]:
    """Every method on every host."""
    return [Cell(host, method) for method in methods() for host in HOSTS]


def _imported(path: Path) -> ModuleType:
    if not path.is_file():
        raise pytest.UsageError(f"METHOD={path} is no file.")
    name = f"method_in_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses and pickle look
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Cell:
    """One method on one host: what the tests need to build, run and train it."""

    def __init__(self, host: Host, method: type[Method]) -> None:
        self.host, self.method = host, _fitted(method(), host)

    @cached_property
    def refusal(self) -> str:
        """Why the method does not apply to the host; empty where it does."""
        try:
            plan_injection(self.host.network(), self.method, "default")
        except NotApplicableError as error:
            return str(error)
        return ""

    def base(self) -> nn.Module:
        """A fresh copy of the network, in train mode."""
        return copy.deepcopy(self.host.network()).train()

    def adapted(self, base: nn.Module | None = None, name: str = "default", method: Method | None = None) -> nn.Module:
        """``base`` (a fresh one unless given) with the method injected."""
        model = self.base() if base is None else base
        inject(model, method or self.method, name)
        return model

    def trained(self, base: nn.Module | None = None, name: str = "default") -> nn.Module:
        """The adapted model with an adapter that is no longer fresh."""
        model = self.adapted(base, name)
        perturb(model, name)
        return model

    def without_saved_modules(self) -> Method:
        """The method without ``modules_to_save``, whose effect would hide that of the adapters."""
        if "modules_to_save" not in self.method.field_names():
            return self.method
        method = replace(self.method, modules_to_save=None)  # type: ignore[type-var]
        try:
            method.plan(self.host.network(), [])
        except NotApplicableError:  # what it trains whole is all that it does
            return self.method
        return method

    def run(self, model: Callable[..., Any], dtype: torch.dtype | None = None) -> Tensor:
        """The model's output for the example, whose floating-point inputs are cast to ``dtype``."""
        args, kwargs = self.host.example()
        output = model(*(_cast(x, dtype) for x in args), **{key: _cast(x, dtype) for key, x in kwargs.items()})
        return output if isinstance(output, Tensor) else output[0]

    def bits(self, model: nn.Module) -> Tensor:
        """The output by kernels that are the same for every model, so that bits can be compared.

        Torch chooses kernels that round differently by whether a weight requires a gradient (in ``matmul``) and by what
        has hooks (in its fused attention).
        """
        training = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return self.run(model)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
            for parameter in training:
                parameter.requires_grad_(True)

    def loss(self, model: Callable[..., Any], dtype: torch.dtype | None = None) -> Tensor:
        """A number that depends on every part of the output."""
        output = self.run(model, dtype).float()
        return (output * torch.linspace(0.5, 1.5, output.numel()).view_as(output)).square().mean()

    def gradients(self, model: nn.Module, loss: Tensor | None = None) -> dict[str, Tensor]:
        """The gradient of every parameter that trains."""
        (self.loss(model) if loss is None else loss).backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, f"no gradient reaches {missing}"
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def train(self, model: nn.Module, steps: int = 3, dtype: torch.dtype | None = None) -> None:
        """Take a few optimizer steps in train mode."""
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(model, dtype).backward()
            optimizer.step()


def perturb(model: nn.Module, name: str = "default") -> None:
    """Move every trainable parameter of the adapter ``name`` a little from where it started."""
    perturbation.perturb(model, name, by=0.05)


def _fitted(method: Method, host: Host) -> Method:
    """``method`` as it is where it finds its own places in the network, else pointed at the host's layers."""
    method = _changed(method, {"num_virtual_tokens": 3})  # the position tables of the tiny models are short
    pointed = _changed(method, {"target_modules": list(host.targets)})
    if getattr(method, "target_modules", "") is None:
        # The first layer alone where the layers are all that there is, which a method that tunes a part refuses.
        for candidate in (method, pointed, _changed(method, {"target_modules": [host.targets[0]]})):
            try:
                candidate.plan(host.network(), [])
            except (NotApplicableError, TargetError):
                continue
            return candidate
    return pointed


def _changed(method: Method, values: dict[str, Any]) -> Method:
    """``method`` (and the methods it is made of) with other values in those of the fields that it has."""
    changes: dict[str, Any] = {}
    for f in fields(method):  # type: ignore[arg-type]
        value = getattr(method, f.name)
        if f.name in values:
            changes[f.name] = values[f.name]
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Method) for item in value):
            changes[f.name] = type(value)(_changed(item, values) for item in value)
    return replace(method, **changes)  # type: ignore[type-var]


def _cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.to(dtype) if dtype and x.is_floating_point() else x
