"""Keys and values before an ``nn.MultiheadAttention``'s own, which has no argument for them.

The attention is computed here, in place of the module's own forward, with the weights that this would use.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapter import CallAdapter, Run
from lightning_peft.errors import ConfigError
from lightning_peft.network.calls import bound
from lightning_peft.prompting.attention import eject_prefix

_ORDER = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


class PrefixedMultihead(CallAdapter):
    """Puts keys and values before an ``nn.MultiheadAttention``'s own.

    Args:
        prefix: called with the attention's query, gives keys and values, each (P, embed_dim) or (batch, P, embed_dim).
    """

    def __init__(self, prefix: nn.Module) -> None:
        super().__init__()
        self.prefix = prefix

    def eject(self) -> bool:
        eject_prefix(self, self.prefix)
        return False

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        given = bound(_ORDER, args, kwargs)
        if given.get("is_causal") and given.get("attn_mask") is None:
            raise ConfigError("is_causal=True is a hint beside attn_mask, as in nn.MultiheadAttention: give the mask.")
        # The rest of the call, which is not run, are further prefixes and the forward that is computed here.
        others = [adapter for adapter in run.rest if isinstance(adapter, PrefixedMultihead)]
        prefixes = [adapter.prefix(given["query"]) for adapter in (self, *others)]
        return _attend(run.host, given, prefixes)  # type: ignore[arg-type]


def _attend(
    host: nn.MultiheadAttention, given: dict[str, Any], prefixes: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor | None]:
    w = _weights(host)
    query, key, value = given["query"], given["key"], given["value"]
    batched = query.dim() == 3
    if not batched:
        query, key, value = query[None], key[None], value[None]
    elif not host.batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    q = _split(F.linear(query, w["q"], w["q_bias"]), host.num_heads)  # type: ignore[arg-type]
    k, v = F.linear(key, w["k"], w["k_bias"]), F.linear(value, w["v"], w["v_bias"])  # type: ignore[arg-type]
    mask = _mask(given, host.num_heads, q, k.shape[1])
    behind = 0
    if w["bias_k"] is not None and w["bias_v"] is not None:
        k, v, behind = _append(k, w["bias_k"]), _append(v, w["bias_v"]), behind + 1
    if host.add_zero_attn:
        zero = k.new_zeros(1, 1, k.shape[-1])
        k, v, behind = _append(k, zero), _append(v, zero), behind + 1
    # In front of all keys: bias_k and the zero stand behind them.
    before = 0
    for keys, values in prefixes:
        before += keys.shape[-2]
        k = torch.cat([keys.to(k.dtype).expand(k.shape[0], -1, -1), k], 1)
        v = torch.cat([values.to(v.dtype).expand(v.shape[0], -1, -1), v], 1)
    k, v = _split(k, host.num_heads), _split(v, host.num_heads)
    if mask is not None:
        mask = F.pad(mask, (before, behind))
    dropout = host.dropout if host.training else 0.0
    weights = None
    # Torch's kernel returns no weights, so they are computed where the caller wants them.
    if given.get("need_weights", True):
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout, host.training)
        heads = weights @ v
        weights = weights[..., before:]  # the caller knows nothing of a prefix
        weights = weights.mean(1) if given.get("average_attn_weights", True) else weights
    else:
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = F.linear(heads.transpose(1, 2).flatten(2), w["out"], w["out_bias"])  # type: ignore[arg-type]
    if not batched:
        return out[0], None if weights is None else weights[0]
    return out if host.batch_first else out.transpose(0, 1), weights


def _weights(host: nn.MultiheadAttention) -> dict[str, Tensor | None]:
    """The weights of ``host`` by what they make."""
    joint: Any = host._parameters["in_proj_weight"]
    if joint is None:
        q, k, v = (host._parameters[f"{name}_proj_weight"] for name in "qkv")
    else:
        q, k, v = joint.chunk(3)
    bias: Any = host._parameters["in_proj_bias"]
    q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.chunk(3)
    made = {"q": q, "k": k, "v": v, "q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias}
    out = host.out_proj._parameters
    return {**made, "out": out["weight"], "out_bias": out["bias"], "bias_k": host.bias_k, "bias_v": host.bias_v}


def _mask(given: dict[str, Any], heads: int, q: Tensor, keys: int) -> Tensor | None:
    """Both masks as one to be added to the scores: (batch or 1, heads or 1, queries or 1, keys)."""
    padding, mask = _added(given.get("key_padding_mask"), q.dtype), _added(given.get("attn_mask"), q.dtype)
    if padding is not None:
        padding = padding.view(-1, 1, 1, keys)
    if mask is not None:
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, heads))
    if padding is None or mask is None:
        return mask if padding is None else padding
    return mask + padding


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _append(x: Tensor, last: Tensor) -> Tensor:
    return torch.cat([x, last.to(x.dtype).expand(x.shape[0], 1, -1)], 1)


def _split(x: Tensor, heads: int) -> Tensor:
    """(batch, length, embed_dim) to (batch, heads, length, features)."""
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)
