"""What a ``.ckpt`` holds of a module with adapters: the adapters alone, the merged model, or everything."""

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.checkpoints.ckpt import METADATA_KEY, adapter_keys, metadata
from lightning_peft.injection.registry import registries
from lightning_peft.merging.merge import merged
from lightning_peft.network.walk import plain_name

Content = Literal["adapter", "merged", "full"]

_OF_TRAINING = ("callbacks", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state")


def check_content(module: nn.Module, content: Content) -> None:
    """Raise if the chosen content could not be written, before time is lost.

    Raises:
        NotMergeableError: it is ``"merged"``, and an adapter cannot be merged.
    """
    if content == "merged":
        with _all_merged(module):
            pass


def keep_content(module: nn.Module, checkpoint: dict[str, Any], content: Content) -> None:
    """Reduce a checkpoint of Lightning to what was chosen.

    ``"adapter"``: tensors of adapters, wherever the checkpoint holds a state of the module (also in the state of
    callbacks which average weights). ``"full"``: the base as well. ``"merged"``: a full checkpoint of the module as it
    is without adapters, with nothing of the training that made it.
    """
    if content == "merged":
        checkpoint["state_dict"] = _merged_state(module, checkpoint["state_dict"])
        for key in _OF_TRAINING:
            checkpoint.pop(key, None)
        return
    if content == "adapter":
        base = module.state_dict(keep_vars=True).keys() - adapter_keys(module)
        checkpoint.update(_without(checkpoint, base))
    checkpoint["state_dict"] = {plain_name(key): value for key, value in checkpoint["state_dict"].items()}
    checkpoint[METADATA_KEY] = metadata(module)


def _without(value: Any, keys: Set[str]) -> Any:
    """``value`` with ``keys`` left out of every mapping in it that has all of them."""
    if not isinstance(value, dict):
        return value
    whole = bool(keys) and keys <= value.keys()
    return type(value)((k, _without(v, keys)) for k, v in value.items() if not (whole and k in keys))


@torch.no_grad()
def _merged_state(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base's state with every adapter folded in, taking the adapters' values from ``state``.

    Those may be averages (WeightAveraging), and not what the module trains with at the moment.
    """
    own = adapter_keys(module)
    here = {key: tensor for key, tensor in module.state_dict().items() if key in own}
    before = {key: tensor.clone() for key, tensor in here.items()}
    try:
        for key, tensor in here.items():
            tensor.copy_(state[key])
        with _all_merged(module):
            # Copies: the module goes on with its own base. On the CPU, where there is room for a second one.
            return {key: tensor.to("cpu", copy=True) for key, tensor in module.state_dict().items() if key not in own}
    finally:
        for key, tensor in here.items():
            tensor.copy_(before[key])


@contextmanager
def _all_merged(module: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for _, owner, registry in registries(module):
            for name in registry.active:
                stack.enter_context(merged(owner, name))
        yield
