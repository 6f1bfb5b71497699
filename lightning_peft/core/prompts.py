"""Virtual tokens before the text of a transformers model.

The model is given placeholders before its token ids, and its embedding puts the learned vectors in their places, so
masks, positions, pooling by token and the cache are the model's own work. What it puts out is cut to the length that
the caller has sent.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapter import InputAdapter, OutputAdapter
from lightning_peft.core.heads import pretrained_models
from lightning_peft.core.method import Placement
from lightning_peft.core.positions import check_room, free_positions, position_modules
from lightning_peft.core.taps import Tap
from lightning_peft.errors import ConfigError, NotApplicableError

_IGNORED = -100  # the label that transformers' losses leave out
_SEQUENCES = ("last_hidden_state", "hidden_states", "logits", "prediction_logits")  # (..., length, features)
_SPANS = ("start_logits", "end_logits")  # (batch, length)


def token_models(name: str, model: nn.Module) -> list[tuple[str, Any]]:
    """The parts of ``model`` that read token ids and can be given virtual ones: whole models, or their encoders.

    Raises:
        NotApplicableError: there is none.
    """
    found: list[tuple[str, Any]] = []
    reason = f"{type(model).__name__} holds no transformers model"
    for path, pretrained in pretrained_models(model):
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


def embedding_of(pretrained: Any) -> nn.Embedding:
    """The token embedding before which a prompt is put."""
    reader = pretrained.get_encoder() if pretrained.config.is_encoder_decoder else pretrained
    embedding: nn.Embedding = reader.get_input_embeddings()
    return embedding


def place_prompt(
    name: str, model: nn.Module, path: str, pretrained: Any, prompt: nn.Module, size: int
) -> list[Placement]:
    """The adapters that put ``prompt`` before the text of the transformers model at ``path``.

    Args:
        name: the method's, for messages.
        model: the network.
        path: path of ``pretrained`` in it.
        pretrained: one of :func:`token_models`.
        prompt: called without arguments, gives the vectors (size, features).
        size: virtual tokens.

    Raises:
        ConfigError: they leave no room in the model's position table.
    """
    crossing = pretrained.config.is_encoder_decoder
    reader = pretrained.get_encoder() if crossing else pretrained
    at = path_of(model, reader)
    tables = [(table, free) for table, module in position_modules(reader) if (free := free_positions(module))]
    for table, module in position_modules(reader):
        check_room(name, size, table, module)
    vectors, length = Tap(), Tap()
    room = min(((free, table) for table, free in tables), default=None)
    placements = [
        Placement(at, PromptInput(prompt, size, reader, _placeholder(pretrained), vectors, length, room)),
        Placement(path_of(model, embedding_of(pretrained)), PromptEmbedding(prompt, size, vectors), "embedding"),
    ]
    if crossing:
        decoder = pretrained.get_decoder()
        placements.append(Placement(path_of(model, decoder), CrossMask(size, decoder), "mask"))
        placements.append(Placement(path, EncoderCrop(size), "crop"))
    else:
        placements.append(Placement(at, PromptCrop(length), "crop"))
    return placements


class PromptInput(InputAdapter):
    """Makes room for the virtual tokens in everything that the model is called with."""

    def __init__(
        self, prompt: nn.Module, size: int, reader: nn.Module, placeholder: int, vectors: Tap, length: Tap, room: Any
    ) -> None:
        super().__init__()
        self.prompt, self.size, self.placeholder, self.room = prompt, size, placeholder, room
        self.vectors, self.length = vectors, length
        self.order = list(inspect.signature(reader.forward).parameters)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = {**dict(zip(self.order, args, strict=False)), **kwargs}
        ids, embeds, cache = call.get("input_ids"), call.get("inputs_embeds"), call.get("past_key_values")
        self.vectors.value = self.length.value = None
        if ids is None and embeds is None:
            return args, kwargs
        past = 0 if cache is None else cache.get_seq_length()
        shape = embeds.shape[:-1] if embeds is not None else ids.shape  # type: ignore[union-attr]
        if past:  # the virtual tokens are in the cache: only what speaks of the whole text is to know of them
            return (), {**call, **self._mask(call), **self._moved(call)}
        self._check(shape[-1])
        self.length.value = shape[-1]
        if embeds is not None:
            vectors = self.prompt().to(embeds.dtype).expand(*shape[:-1], -1, -1)
            call["inputs_embeds"] = torch.cat([vectors, embeds], -2)
        if ids is not None:
            self.vectors.value = shape[-1] if embeds is None else None
            call["input_ids"] = self._before(ids, self.placeholder)
        if call.get("token_type_ids") is not None:
            call["token_type_ids"] = self._before(call["token_type_ids"], 0)
        labels = call.get("labels")
        if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
            call["labels"] = self._before(labels, _IGNORED)
        for name in ("start_positions", "end_positions"):
            if call.get(name) is not None:
                call[name] = call[name] + self.size
        return (), {**call, **self._mask(call), **self._moved(call, new=True)}

    def _mask(self, call: dict[str, Any]) -> dict[str, Tensor]:
        mask = call.get("attention_mask")
        if mask is None:
            return {}
        if not isinstance(mask, Tensor) or mask.dim() > 3:
            raise NotApplicableError(
                "Virtual tokens need an attention mask of shape (batch, tokens), and this model was called with "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}. In generate, leave "
                "cache_implementation at its default."
            )
        return {"attention_mask": self._before(mask, 1)}

    def _moved(self, call: dict[str, Any], new: bool = False) -> dict[str, Tensor]:
        """Positions behind the virtual tokens, with those of the tokens themselves if they are new."""
        moved = {}
        for name in ("position_ids", "cache_position"):
            if (positions := call.get(name)) is not None:
                own = torch.arange(self.size, device=positions.device, dtype=positions.dtype)
                own = own.expand(*positions.shape[:-1], -1)
                moved[name] = torch.cat([own, positions + self.size], -1) if new else positions + self.size
        return moved

    def _before(self, x: Tensor, value: int) -> Tensor:
        return torch.cat([x.new_full((*x.shape[:-1], self.size), value), x], -1)

    def _check(self, length: int) -> None:
        if self.room and length + self.size > self.room[0]:
            raise ConfigError(
                f"A text of {length} tokens and {self.size} virtual ones do not fit into the {self.room[0]} positions "
                f"of '{self.room[1]}'. Shorten the text (max_length), or use fewer virtual tokens (num_virtual_tokens)."
            )


class PromptEmbedding(OutputAdapter):
    """Puts the vectors where the placeholders were."""

    def __init__(self, prompt: nn.Module, size: int, vectors: Tap) -> None:
        super().__init__()
        self._prompt = (prompt,)  # in a tuple: it belongs to the other adapter
        self.size, self.vectors = size, vectors

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        length = self.vectors.take()
        if length is None:
            return y
        start = y.shape[-2] - length - self.size  # another prompt may stand before
        vectors = self._prompt[0]().to(y.dtype).expand(*y.shape[:-2], -1, -1)
        return torch.cat([y[..., :start, :], vectors, y[..., start + self.size :, :]], -2)


class PromptCrop(OutputAdapter):
    """Cuts what the model puts out for each token to the tokens that were sent."""

    def __init__(self, length: Tap) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Any, y: Any) -> Any:
        length = self.length.take()
        return y if length is None else _crop(y, lambda size: min(size, length))


class EncoderCrop(OutputAdapter):
    """Cuts what an encoder-decoder model hands out of its encoder by the virtual tokens."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Any, y: Any) -> Any:
        return _crop(y, lambda size: size - self.size, "encoder_")


class CrossMask(InputAdapter):
    """Lets a decoder see what the encoder has made of the virtual tokens."""

    def __init__(self, size: int, decoder: nn.Module) -> None:
        super().__init__()
        self.size = size
        self.order = list(inspect.signature(decoder.forward).parameters)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = {**dict(zip(self.order, args, strict=False)), **kwargs}
        mask = call.get("encoder_attention_mask")
        if mask is not None:
            call["encoder_attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], self.size), mask], -1)
        return (), call


def _placeholder(pretrained: Any) -> int:
    """An id that no model takes for padding or the end of a text, neither by its meaning nor by being the largest."""
    embedding, config = embedding_of(pretrained), pretrained.config
    special: set[Any] = {embedding.padding_idx}
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "sep_token_id", "cls_token_id"):
        ids = getattr(config, name, None)
        special.update(ids if isinstance(ids, (list, tuple)) else [ids])
    return next(i for i in range(embedding.num_embeddings) if i not in special)


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """The path of a module in ``model``."""
    paths = {id(module): path for path, module in model.named_modules()}
    return paths[id(wanted)]


def _crop(output: Any, keep: Callable[[int], int], prefix: str = "") -> Any:
    """``output`` with the last ``keep(size)`` of whatever has a place for each token, in the fields of that prefix."""
    if isinstance(output, dict):  # every ModelOutput is one
        fields = {
            name: _cropped(value, keep, name.removeprefix(prefix)) if name.startswith(prefix) else value
            for name, value in output.items()
        }
        return type(output)(**fields)
    return output if prefix else _cropped(output, keep)


def _cropped(value: Any, keep: Callable[[int], int], name: str = "hidden_states") -> Any:
    if isinstance(value, tuple):
        return tuple(_cropped(item, keep, name) for item in value)
    if not isinstance(value, Tensor):
        return value
    dims = (-1,) if name in _SPANS else (-2,) if name in _SEQUENCES and value.dim() >= 3 else ()
    for dim in (-2, -1) if name == "attentions" else dims:
        size = value.shape[dim]
        value = value.narrow(dim, size - keep(size), keep(size))
    return value
