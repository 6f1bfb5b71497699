"""What a call of a transformers model, or of a part of one, means: its cache, padding, positions, and which step it is.

transformers renames arguments between releases: what 5.24 calls ``cache`` was ``past_key_values``. This module alone
knows such names. It knows a cache by its type, too, so that the next name is no surprise; and where a decoding step is
under way whose cache is found in neither way, that is an error, since "no cache" would give wrong tokens silently.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.errors import NotApplicableError
from lightning_peft.network.calls import LENGTHS, Call
from lightning_peft.optional import HF_NEWEST, hf_version
from lightning_peft.prompting.padding import left_padding

SHARED_BY_ROWS = ("cache_position",)
"""Arguments that say something of the tokens of all rows at once."""

_CACHES = ("cache", "past_key_values", "layer_past", "cache_params")  # the newest name first
_STATES = ("state", "mems", "past_buckets_states")  # of RWKV, XLNet, Reformer: they are no caches and have no length
_POSITIONS = ("position_ids", "cache_position")
_TYPES = ("token_type_ids", "mm_token_type_ids")
_OF_TOKENS = ("input_ids", "attention_mask", "labels", *_TYPES, *_POSITIONS)


def find_cache(call: Call) -> Any:
    """The cache that a call reads and adds to; None if it was given none.

    Raises:
        NotApplicableError: what stands under the name of a cache counts no tokens.
    """
    named = next((call[name] for name in _CACHES if call.get(name) is not None), None)
    if named is not None and not _counts_tokens(named):
        raise NotApplicableError(
            f"The cache of this call is a {type(named).__name__}, which does not say how many tokens are in it "
            f"(transformers {hf_version()}). Pass a transformers.Cache, or use_cache=False."
        )
    return named if named is not None else next((x for x in call.values() if _counts_tokens(x)), None)


def cached_tokens(call: Call, new: int) -> int:
    """How many tokens are in the cache of a model's call, virtual ones included; 0 in the first step and without one.

    Args:
        call: of a model that reads tokens, with an attention mask (..., cached + new) or none.
        new: tokens that the call brings.

    Raises:
        NotApplicableError: its mask or positions speak of tokens before, so there must be a cache, and none is
            recognised.
    """
    cache = find_cache(call)
    if cache is not None:
        return int(_length(cache) or 0)
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if isinstance(mask, Tensor) and mask.shape[-1] > new:
        raise no_cache_found(new, mask.shape[-1])
    # generate leaves out a mask of ones, but not the positions. Without a cache, a text may begin at any of them.
    told = mask is None and call.get("use_cache") and not torch.compiler.is_compiling()
    if told and positions is not None and positions.dim() == 2 and bool((positions[..., 0] > 0).all()):
        raise no_cache_found(new, int(positions.max()) + 1)
    return 0


def layer_cached_tokens(call: Call, layer: int) -> int | Tensor | None:
    """How many tokens are in the cache of one attention before it adds new ones; None if there is no cache."""
    cache = find_cache(call)
    length = None if cache is None else _length(cache, layer)
    return length.clone() if isinstance(length, Tensor) else length  # a static cache counts in place


def no_cache_found(new: int, seen: int) -> NotApplicableError:
    """The error for a call of ``new`` tokens that sees ``seen``, as a decoding step does, and has no known cache."""
    return NotApplicableError(
        f"Mask or positions are of {seen} tokens, and the call brings {new} and no cache that is recognised. If it is "
        f"a decoding step, with {new} new of {seen} tokens, transformers {hf_version()} hands its cache on in a way "
        "that is not known here, and what stands before the text would be read twice: pass use_cache=False, or install "
        f"transformers=={HF_NEWEST}, the newest release that was run. If not, give those of the {new} tokens."
    )


def resumes_recurrence(call: Call) -> bool:
    """True if a recurrent model (Mamba, RWKV) goes on from a state, which has what stood before the text in it."""
    if any(call.get(name) is not None for name in _STATES):
        return True
    cache = find_cache(call)
    return cache is not None and _length(cache) is None and bool(cache.has_previous_state())


def row_padding(call: Call, dims: int) -> Tensor | None:
    """How many tokens of padding each row of a model's call begins with, (..., 1); None where no row does.

    Args:
        call: of a model that reads tokens.
        dims: how many dimensions its token ids have.

    Raises:
        NotApplicableError: the mask is not one of tokens, with the dimensions of the token ids.
    """
    mask = call.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != dims):
        raise NotApplicableError(
            "Virtual tokens need an attention mask of shape (batch, tokens), and this model was called with "
            f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}. In generate, leave "
            "cache_implementation at its default, and pass no static cache: it has no room for them."
        )
    return left_padding(mask)


def text_length(call: Call) -> int | None:
    """How many tokens of text a later step's mask or positions speak of, cached ones included; None if neither says."""
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if mask is not None:
        return int(mask.shape[-1])
    if positions is not None and positions.dim() == 2 and not torch.compiler.is_compiling():
        return int(positions.max()) + 1
    return None


def check_one_text(call: Call) -> None:
    """Raise if a row of a model's call holds several texts, as positions that begin anew tell.

    Raises:
        NotApplicableError: it does; what stands before the row would stand before its first text alone.
    """
    mask, positions = call.get("attention_mask"), call.get("position_ids")
    if positions is None or positions.dim() != 2 or torch.compiler.is_compiling():
        return
    anew = (positions.diff(dim=-1) < 0) & (positions[..., 1:] == positions[..., :1])  # back where the row began
    if mask is not None and mask.shape == positions.shape:
        anew = anew & mask[..., :-1].bool() & mask[..., 1:].bool()  # padding may have any position
    if bool(anew.any()):
        raise NotApplicableError(
            "A row of this call holds several texts (its position_ids begin anew), and virtual tokens would stand "
            "before the first of them alone. Give each text a row of its own, or use a method that is not a prompt."
        )


def check_token_arguments(call: Call, shape: Sequence[int]) -> None:
    """Raise if a model's call says something of each token that is not known here, so not of virtual ones either.

    Args:
        call: of a model that reads tokens.
        shape: of its token ids, (..., tokens).

    Raises:
        NotApplicableError: an argument that is not known has their shape, or a place for each pair of them.
    """
    for name, value in call.items():
        if not isinstance(value, Tensor) or name in _OF_TOKENS:
            continue
        pairs = value.shape == (*shape, shape[-1])
        if pairs or (value.shape == tuple(shape) and not value.is_floating_point()):
            raise NotApplicableError(
                f"The call's '{name}' ({tuple(value.shape)}) says something of each of its {shape[-1]} tokens, and "
                "what it would say of virtual tokens before them is not known. Leave it out, or use a method that is "
                "not a prompt, such as LoRA or BottleneckAdapter."
            )


def given_positions(call: Call) -> Iterator[tuple[str, Tensor]]:
    """The arguments that number the tokens of a model's call, (..., tokens) each, and their names."""
    return ((name, call[name]) for name in _POSITIONS if call.get(name) is not None)


def token_types(call: Call) -> Iterator[tuple[str, Tensor]]:
    """The arguments that say which part of a model's call a token belongs to, (..., tokens) each, and their names."""
    return ((name, call[name]) for name in _TYPES if call.get(name) is not None)


def position_argument(names: Sequence[str], call: Call, owner: str) -> str:
    """The argument by which a position table, or what computes positions, is told where the tokens stand.

    Args:
        names: the arguments of its forward.
        call: the call.
        owner: its path, for messages.

    Raises:
        NotApplicableError: it counts from an argument that is not known here.
    """
    lengths = [name for name in LENGTHS if name in names]
    if "position_ids" in names:
        if call.get("position_ids") is not None:
            return "position_ids"
        if not lengths:
            raise NotApplicableError(
                f"'{owner}' was called without position_ids, and how else it counts its tokens ({', '.join(names)}) is "
                f"not known here (transformers {hf_version()}). Pass position_ids, or use LoRA or BottleneckAdapter."
            )
    return lengths[0] if lengths else names[0]


def with_shifted_positions(call: Call, amount: int) -> tuple[Call, Tensor]:
    """The call of a stack that :func:`numbers_tokens` with its tokens ``amount`` positions later, and these positions.

    They are the positions that the call has, (..., tokens), or those behind the tokens in its cache, (batch, tokens);
    padding before a row is not counted, as it would stand between the row and what is put before it.
    """
    positions = call.get("position_ids")
    if positions is None:
        tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        rows, new = tokens.shape[:2]
        cache = find_cache(call)
        # Without a cache cached_tokens still looks whether there must be one, and refuses.
        past = cached_tokens(call, new) if cache is None else _length(cache) or 0
        positions = (torch.arange(new, device=tokens.device) + past).expand(rows, -1)
        mask = call.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and (padding := left_padding(mask)) is not None:
            positions = (positions - padding).clamp(min=0)
    positions = positions + amount
    return {**call, "position_ids": positions}, positions


def is_cache(value: Any) -> bool:
    """True for a cache of transformers, or one layer of it, recurrent or not: all can reorder the rows of a batch."""
    return hasattr(type(value), "reorder_cache")


def _counts_tokens(value: Any) -> bool:
    return hasattr(type(value), "get_seq_length")


def _length(cache: Any, layer: int = 0) -> int | Tensor | None:
    """How many tokens a layer of a cache has keys of; None in a cache that holds states of recurrent layers alone."""
    try:
        length: int | Tensor = cache.get_seq_length(layer)
    except ValueError:  # with a reason of its own: no layer of it is an attention's
        return None
    return length
