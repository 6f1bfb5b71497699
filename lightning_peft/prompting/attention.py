"""Keys and values before an attention's own.

The attentions of transformers look up the function that computes them, under the name that their config gives. While a
prefix acts, its attention sees a config, in this call alone, that names :func:`attend`, which puts the prefix in front
and calls the function that was meant. No base module, config or global setting is changed.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter, CallAdapter, Reference, Run
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.calls import argument_names, bound, code_names, first_input
from lightning_peft.optional import check_hf_version, hf_attention_functions
from lightning_peft.prompting.call import layer_cached_tokens, no_cache_found

_NAME = "lightning_peft"
_KNOWN = ("sdpa", "eager")  # those whose mask has a column for each key
_functions: Any = None  # transformers' table of attention functions, once a prefix needs it


class PrefixedAttention(CallAdapter):
    """Puts keys and values before the own ones of an attention of transformers.

    Args:
        prefix: called with the attention's input, gives keys and values, each (P, heads · features) or (batch, P, ...).
        host: the attention.
        relative: the module whose ``compute_bias`` gives the bias of relative positions, where the model has one.
    """

    def __init__(self, prefix: nn.Module, host: nn.Module, relative: nn.Module | None) -> None:
        super().__init__()
        self.prefix = prefix
        self.names = argument_names(host)
        self.layer = int(getattr(host, "layer_idx", None) or 0)
        self.eager = inspect.unwrap(type(host).forward).__globals__.get("eager_attention_forward")
        self.relative = Reference(relative)
        check_hf_version()
        _register()

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        past = None
        if self.relative.module is not None:  # before the attention adds to its cache
            past = layer_cached_tokens(bound(self.names, args, kwargs), self.layer)
        keys, values = self.prefix(first_input(args, kwargs))
        host = vars(run.host)  # of this call alone
        host["config"] = _RoutedConfig(host["config"], self, keys, values, past)
        return run(args, kwargs)

    def eject(self) -> bool:
        eject_prefix(self, self.prefix)
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _register()  # in the process that unpickles it


def eject_prefix(adapter: Adapter, prefix: Any) -> None:
    """Let ``prefix`` drop the network that made it, if one did; the rest trains as before."""
    if prefix.eject():
        adapter.trains = frozenset(f"prefix.{name}" for name, _ in prefix.named_parameters())


class _RoutedConfig:
    """An attention's config but for the name of the function that computes it, with what that needs for one prefix."""

    _attn_implementation = _NAME

    def __init__(self, config: Any, adapter: PrefixedAttention, keys: Tensor, values: Tensor, past: Any) -> None:
        self.routed_config, self.adapter, self.keys, self.values, self.past = config, adapter, keys, values, past

    def __getattr__(self, name: str) -> Any:
        return getattr(self.routed_config, name)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute an attention with the prefixes of ``module`` before its keys and values.

    Args:
        module: an attention with a routed config.
        query: (batch, heads, queries, features).
        key: (batch, key heads, keys, features).
        value: (batch, key heads, keys, features).
        attention_mask: (batch, 1 or heads, queries, keys), boolean or to be added; None for none.
        kwargs: handed on.

    Returns:
        What the attention function of the module's own config returns.
    """
    config = module.config
    prefixes: list[_RoutedConfig] = []
    while isinstance(config, _RoutedConfig):
        prefixes.append(config)
        config = config.routed_config
    name = config._attn_implementation
    if name not in _KNOWN:
        raise NotApplicableError(_unknown(module, name))
    function = _functions.get_interface(name, prefixes[0].adapter.eager)
    # A causal kernel without a mask would hide the prefix from the first tokens.
    attention_mask = _explicit(module, query, key, attention_mask, name, kwargs.get("is_causal"))
    ahead = 0
    for prefix in reversed(prefixes):
        keys, values = _heads(prefix.keys, key), _heads(prefix.values, key)
        before, length = keys.shape[2], key.shape[2]
        ahead += before
        key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        # Every token sees the whole prefix.
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask[..., :length], (before, 0), value=attention_mask.dtype == torch.bool)
        if kwargs.get("position_bias") is not None:
            bias = kwargs["position_bias"]
            kwargs["position_bias"] = torch.cat([_relative_bias(prefix, bias, before, ahead), bias], -1)
    output, weights = function(module, query, key, value, attention_mask, **kwargs)
    return output, None if weights is None else weights[..., ahead:]  # the caller knows nothing of a prefix


def routes_attention(module: nn.Module) -> bool:
    """True if ``module`` is an attention of transformers that looks up its function."""
    return "config" in vars(module) and "ALL_ATTENTION_FUNCTIONS" in code_names(module)


def check_implementation(module: Any) -> None:
    """Raise unless a prefix can be put before the keys of ``module`` as it is set up now.

    Raises:
        NotApplicableError: it uses a kernel without a mask for each key.
    """
    if module.config._attn_implementation not in _KNOWN:
        raise NotApplicableError(_unknown(module, module.config._attn_implementation))


def _explicit(
    module: Any, query: Tensor, key: Tensor, mask: Tensor | None, name: str, is_causal: bool | None
) -> Tensor | None:
    """The mask, made where torch's kernel would have been told "causal" in its place."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None or name != "sdpa" or not causal or queries == 1:
        return mask
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """(P, heads · features) or (batch, P, ...) to the shape of ``like``: (batch, heads, P, features)."""
    split: Tensor = x.to(like.dtype).unflatten(-1, (like.shape[1], like.shape[3]))
    return split.transpose(-2, -3).expand(like.shape[0], -1, -1, -1)


def _relative_bias(prefix: _RoutedConfig, bias: Tensor, before: int, ahead: int) -> Tensor:
    """The columns of a prefix that begins ``ahead`` of the first key; zero in an attention without positions."""
    source: Any = prefix.adapter.relative.module
    if source is None:
        return bias.new_zeros(*bias.shape[:-1], before)
    past, queries, keys = prefix.past, bias.shape[-2], bias.shape[-1] - ahead + before
    if past is None and keys > queries:
        raise no_cache_found(queries, keys)
    past = 0 if past is None else past
    columns: Tensor = source.compute_bias(queries, before, device=bias.device, past_seen_tokens=past + ahead)
    return columns.to(bias.dtype).expand(bias.shape[0], -1, -1, -1)


def _register() -> None:
    global _functions
    _functions = hf_attention_functions()
    if _functions is not None:
        _functions.register(_NAME, attend)


def _unknown(module: nn.Module, name: str) -> str:
    return (
        f"A prefix cannot act on {type(module).__name__} with the attention kernel {name!r}, which takes no mask for "
        "each key. Load the model with attn_implementation='sdpa' (or 'eager')."
    )
