"""Virtual tokens before the text of a transformers model.

The model is given placeholders before its token ids, and its embedding puts the learned vectors in their places, so
masks, positions, pooling by token and the cache are the model's own work. What it puts out is cut to the length that
the caller has sent. Where a row begins with padding, the virtual tokens come behind that; but not in an encoder that a
decoder follows, whose texts are padded at their end.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.components.taps import Tap
from lightning_peft.core.adapter import CallAdapter, InputAdapter, OutputAdapter, Reference, Run
from lightning_peft.core.method import Placement, Plan
from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.network.calls import Call, argument_names, bound
from lightning_peft.network.positions import check_room, free_positions, position_modules
from lightning_peft.network.pretrained import pretrained_models
from lightning_peft.network.walk import join
from lightning_peft.optional import check_hf_version
from lightning_peft.prompting.call import (
    cached_tokens,
    check_one_text,
    check_token_arguments,
    given_positions,
    resumes_recurrence,
    row_padding,
    text_length,
    token_types,
)
from lightning_peft.prompting.cropping import EncoderCrop, crop_prompt, with_names
from lightning_peft.prompting.padding import insert, overwrite

_IGNORED = -100  # the label that transformers' losses leave out
_PLACES = ("start_positions", "end_positions", "mc_token_ids")  # arguments that count tokens from the first one


def plan_prompts(name: str, model: nn.Module, size: int, build: Callable[[nn.Embedding], nn.Module]) -> Plan:
    """Put virtual tokens before the text of every transformers model in ``model``.

    Args:
        name: the method's, for messages.
        model: the network.
        size: virtual tokens.
        build: makes the prompt of a model from its token embedding; called without arguments, a prompt gives the
            vectors (size, features).

    Raises:
        NotApplicableError: there is no model that reads token ids.
        ConfigError: they leave no room in a model's position table.
    """
    return Plan(
        [
            placement
            for path, pretrained in _token_models(name, model)
            for placement in _place_prompt(name, model, path, pretrained, build(_embedding_of(pretrained)), size)
        ]
    )


def _token_models(name: str, model: nn.Module) -> list[tuple[str, Any]]:
    """The parts of ``model`` that read token ids and can be given virtual ones: whole models, or their encoders."""
    found: list[tuple[str, Any]] = []
    reason = f"{type(model).__name__} holds no transformers model"
    for path, pretrained in pretrained_models(model):
        check_hf_version()
        # A decoder behind an encoder reads what that has made of the prompt: only the encoder gets one.
        reader = pretrained.get_encoder() if pretrained.config.is_encoder_decoder else pretrained
        if isinstance(reader.get_input_embeddings(), nn.Embedding):
            found.append((path, pretrained))
        else:
            reason = f"{type(pretrained).__name__} embeds no token ids in its input"
    if not found:
        raise NotApplicableError(
            f"{name} puts virtual tokens before a text, and {reason}. Use PrefixTuning, LoRA or BottleneckAdapter."
        )
    return found


def _embedding_of(pretrained: Any) -> nn.Embedding:
    """The token embedding before which a prompt is put."""
    reader = pretrained.get_encoder() if pretrained.config.is_encoder_decoder else pretrained
    embedding: nn.Embedding = reader.get_input_embeddings()
    return embedding


def _place_prompt(
    name: str, model: nn.Module, path: str, pretrained: Any, prompt: nn.Module, size: int
) -> list[Placement]:
    """The adapters that put ``prompt`` before the text of the transformers model at ``path``."""
    crossing = pretrained.config.is_encoder_decoder
    reader = pretrained.get_encoder() if crossing else pretrained
    at = _path_of(model, reader)
    tables = [(join(at, table), module) for table, module in position_modules(reader)]
    for table, module in tables:
        check_room(name, size, table, module)
    # The embedding is deep inside of the model: where the placeholders are can only be handed to it.
    vectors = Tap()
    room = min(((free, table) for table, module in tables if (free := free_positions(module))), default=None)
    placements = [
        Placement(at, PromptedCall(prompt, size, pretrained, vectors, room)),
        Placement(
            _path_of(model, _embedding_of(pretrained)),
            PromptEmbedding(prompt, size, _placeholder(pretrained), vectors),
            "embedding",
        ),
    ]
    if crossing:
        decoder = pretrained.get_decoder()
        placements.append(Placement(_path_of(model, decoder), CrossMask(size, decoder), "mask"))
        placements.append(Placement(path, EncoderCrop(size, pretrained), "crop"))
    return placements


class Placeholders(NamedTuple):
    """Where the placeholders of one call are, for the embedding that looks them up."""

    start: int
    """Their first place in a row, where no padding is before it."""
    rows: int
    total: int
    """Tokens of a row, all that are virtual included."""
    padding: Tensor | None


class PromptedCall(CallAdapter):
    """Makes room for the virtual tokens in everything that the model is called with, and cuts them off its output."""

    needs_whole_sequences = True  # they stand before a row

    def __init__(self, prompt: nn.Module, size: int, pretrained: Any, vectors: Tap, room: Any) -> None:
        super().__init__()
        self.prompt, self.size, self.placeholder, self.room = prompt, size, _placeholder(pretrained), room
        self.vectors, self.crossing = vectors, pretrained.config.is_encoder_decoder
        self._pretrained = Reference(pretrained)
        self.names = argument_names(pretrained.get_encoder() if self.crossing else pretrained)

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = bound(self.names, args, kwargs)
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if (ids is None and embeds is None) or resumes_recurrence(call):
            return run(args, kwargs)
        shape = embeds.shape[:-1] if embeds is not None else ids.shape  # type: ignore[union-attr]
        new, past = shape[-1], cached_tokens(call, shape[-1])
        self._check(past + new + (0 if past else self.size))
        padding = row_padding(call, len(shape))
        if not past:
            check_one_text(call)
            check_token_arguments(call, shape)
        if self.crossing:  # an encoder's texts are padded at their end
            padding = None
        text = self._text_in(run, past, new, call) if past else new
        if call.get("attention_mask") is not None:
            call["attention_mask"] = self._inserted(call["attention_mask"], 1, padding)
        call.update(self._moved(call, padding, new=not past))
        if not past:  # else the virtual tokens are in the cache: only what speaks of the whole text is to know of them
            self._insert(run, call, shape, padding)
        try:
            if self.crossing:
                return run((), call)
            return with_names(self._pretrained.module, run, call, lambda y: crop_prompt(y, new, text, padding))
        finally:
            self.vectors.take()  # of a call that did not come to the embedding

    def _insert(self, run: Run, call: Call, shape: Sequence[int], padding: Tensor | None) -> None:
        """Put the virtual tokens into everything in ``call`` that says something of each token."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if embeds is not None:
            vectors = self.prompt().to(embeds.dtype).expand(*shape[:-1], -1, -1)
            call["inputs_embeds"] = insert(embeds, vectors, padding, -2)
        if ids is not None:
            start = sum(prompt.size for prompt in _prompts(run.rest))  # those go before this one
            if embeds is None:
                self.vectors.put(Placeholders(start, math.prod(shape[:-1]), start + self.size + shape[-1], padding))
            call["input_ids"] = self._inserted(ids, self.placeholder, padding)
        for name, types in token_types(call):
            call[name] = self._inserted(types, 0, padding)  # text, for models that see images, too
        labels = call.get("labels")
        if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
            call["labels"] = self._inserted(labels, _IGNORED, padding)
        for name in _PLACES:
            if call.get(name) is not None:
                place = call[name].clamp(min=0)  # models take what is below 0 for the first token
                behind = place >= (0 if padding is None else padding.view_as(place))
                call[name] = place + self.size * behind
        kept = call.get("logits_to_keep")
        if isinstance(kept, Tensor):
            call["logits_to_keep"] = torch.where(kept < 0, kept, kept + self.size)

    def _text_in(self, run: Run, past: int, new: int, call: Call) -> int:
        """How many tokens of text the cache and the call hold."""
        prompts = _prompts(run.around)
        text = past + new - sum(prompt.size for prompt in prompts)
        told = text_length(call)
        # To the others the call tells of the virtual tokens before theirs.
        if told not in (None, text) and prompts[0] is self:
            raise NotApplicableError(
                f"The cache holds {past} tokens, {past + new - text} of them virtual, and with {new} new ones that is "
                f"no text of {told}. To go on from a cache, give generate the new tokens alone, with the mask of all."
            )
        return text

    def _moved(self, call: Call, padding: Tensor | None, new: bool) -> dict[str, Tensor]:
        """Positions behind the virtual tokens, and the virtual tokens' own positions if they are new."""
        moved = {}
        for name, positions in given_positions(call):
            own = torch.arange(self.size, device=positions.device, dtype=positions.dtype)
            later = positions + self.size
            moved[name] = insert(later, own.expand(*positions.shape[:-1], -1), padding) if new else later
        return moved

    def _inserted(self, x: Tensor, value: int, padding: Tensor | None) -> Tensor:
        return insert(x, x.new_full((*x.shape[:-1], self.size), value), padding)

    def _check(self, length: int) -> None:
        if self.room and length > self.room[0]:
            raise ConfigError(
                f"A text of {length - self.size} tokens and {self.size} virtual ones do not fit into the "
                f"{self.room[0]} positions of '{self.room[1]}'. Shorten the text (max_length), or use fewer virtual "
                "tokens (num_virtual_tokens)."
            )


class PromptEmbedding(OutputAdapter):
    """Puts the vectors where the placeholders were."""

    nesting = -1  # behind every other adapter of the embedding: the vectors are learned as they are

    def __init__(self, prompt: nn.Module, size: int, placeholder: int, vectors: Tap) -> None:
        super().__init__()
        self._prompt = Reference(prompt)
        self.size, self.placeholder, self.vectors = size, placeholder, vectors

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        place: Placeholders | None = self.vectors.take()
        if place is None:
            return y
        # More columns are the model's own: padding behind the text (Longformer), or tokens before it (CPM-Ant).
        width, rows, total = x.shape[-1], place.rows, place.total
        if math.prod(x.shape[:-1]) != rows or width < total or (width > total and self._moved(x, place)):
            raise NotApplicableError(
                f"The model looks its tokens up as {tuple(x.shape)}, which is not {rows} rows of {total} tokens that "
                "begin with the virtual ones: these have no place before the text. Use LoRA or BottleneckAdapter."
            )
        vectors = self._prompt.module().to(y.dtype).expand(*y.shape[:-2], -1, -1)
        return overwrite(y, vectors, place.start, place.padding)

    def _moved(self, x: Tensor, place: Placeholders) -> bool:
        """True if the placeholders are not where they were put."""
        expected = torch.full_like(x[..., : self.size], self.placeholder)
        return not torch.equal(overwrite(x[..., None], expected[..., None], place.start, place.padding)[..., 0], x)


class CrossMask(InputAdapter):
    """Lets a decoder see what the encoder has made of the virtual tokens."""

    def __init__(self, size: int, decoder: nn.Module) -> None:
        super().__init__()
        self.size = size
        self.names = argument_names(decoder)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = bound(self.names, args, kwargs)
        mask, states = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
        if mask is not None:
            if states is not None and mask.shape[-1] == states.shape[1]:
                raise ConfigError(
                    f"The encoder's output and its mask are both of {mask.shape[-1]} tokens: there is nothing of the "
                    f"{self.size} virtual ones in it. Take it from get_encoder(), and give the mask of the text."
                )
            call["encoder_attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.size), mask], -1)
        return (), call


def _prompts(adapters: Iterable[CallAdapter]) -> list[PromptedCall]:
    """The prompts of the model among ``adapters``, in their order: each stands before the earlier ones."""
    return [adapter for adapter in adapters if isinstance(adapter, PromptedCall)]


def _placeholder(pretrained: Any) -> int:
    """An id that no model takes for padding or the end of a text, neither by its meaning nor by being the largest."""
    embedding, config = _embedding_of(pretrained), pretrained.config
    special: set[Any] = {embedding.padding_idx}
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "sep_token_id", "cls_token_id"):
        ids = getattr(config, name, None)
        special.update(ids if isinstance(ids, (list, tuple)) else [ids])
    return next(i for i in range(embedding.num_embeddings) if i not in special)


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    """The path of a module in ``model``."""
    paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
    return paths[id(wanted)]
