"""A model's visible state, to show that something left it exactly as it was."""

from typing import Any

import torch
from torch import nn


class Snapshot:
    """Everything of a model that an adapter could disturb: classes, attributes, tensors, flags and hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.classes = {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}
        self.attributes = {path: sorted(vars(module)) for path, module in model.named_modules()}
        self.training = {path: module.training for path, module in model.named_modules()}
        self.hooks = {path: hook_counts(module) for path, module in model.named_modules()}
        self.trains = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        self.identities = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        self.state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}

    def assert_same(self, model: nn.Module, same_tensors: bool = True) -> None:
        """Fail unless ``model`` is what it was; ``same_tensors=False`` compares with a copy."""
        now = Snapshot(model)
        for what in ("classes", "attributes", "training", "hooks", "trains", *(["identities"] if same_tensors else [])):
            _assert_equal(what, getattr(self, what), getattr(now, what))
        assert list(now.state) == list(self.state)
        for key, tensor in self.state.items():
            assert_identical(now.state[key], tensor, key)


def hook_counts(module: nn.Module) -> dict[str, int]:
    """How many hooks of each kind ``module`` has; kinds without any are left out."""
    return {name: len(hooks) for name, hooks in vars(module).items() if "hooks" in name and hooks}


def assert_identical(a: torch.Tensor, b: torch.Tensor, what: str = "tensor") -> None:
    """Fail unless both have the same dtype, shape and bits."""
    assert a.dtype == b.dtype, f"{what}: {a.dtype} is not {b.dtype}"
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} is not {tuple(b.shape)}"
    if hasattr(a, "__tensor_flatten__"):  # a tensor made of tensors, as a quantized one may be
        assert type(a) is type(b), f"{what}: {type(a)} is not {type(b)}"
        for part in a.__tensor_flatten__()[0]:
            assert_identical(getattr(a, part), getattr(b, part), f"{part} of {what}")
        return
    assert torch.equal(a, b), f"{what} differs by up to {(a.double() - b.double()).abs().max():.3g}"


def _assert_equal(what: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    shown = ", ".join(f"'{key}': {before.get(key)} -> {after.get(key)}" for key in sorted(changed)[:3])
    assert not changed, f"{what} changed at {shown}"
