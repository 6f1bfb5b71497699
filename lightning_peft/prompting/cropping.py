"""What a transformers model puts out, cut to the tokens that its caller has sent.

Only names tell which outputs have a place for each token, so while virtual tokens act the model is asked for names,
also where the caller wants a plain tuple.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_peft.core.adapter import CallAdapter, Reference, Run
from lightning_peft.network.calls import Call, argument_names, bound
from lightning_peft.prompting.padding import extract

_SEQUENCES = ("last_hidden_state", "hidden_states", "logits", "prediction_logits")  # (..., length, features)
_SPANS = ("start_logits", "end_logits")  # (batch, length)
_Cut = Callable[[Tensor, int], Tensor]  # what stays of a tensor that has tokens in this dimension


def with_names(pretrained: Any, run: Run, call: Call, crop: Callable[[Any], Any]) -> Any:
    """Run a call of ``pretrained`` for outputs by name, crop them, and give a tuple where the caller wants one."""
    wanted = call.get("return_dict")
    plain = (pretrained.config.return_dict if wanted is None else wanted) is False
    output = crop(run((), {**call, "return_dict": True} if plain else call))
    return output.to_tuple() if plain and hasattr(output, "to_tuple") else output


def crop_prompt(output: Any, new: int, total: int, padding: Tensor | None) -> Any:
    """Cut what a model puts out for each token to the tokens that were sent.

    Args:
        output: of the model.
        new: tokens that the call has brought.
        total: tokens of text that the call and its cache hold.
        padding: how many tokens of padding each row begins with, (..., 1); None where no row does.
    """
    return _crop(
        output,
        lambda x, dim: extract(x, dim, min(x.shape[dim], new), padding),
        lambda x, dim: extract(x, dim, min(x.shape[dim], total), padding),
    )


class EncoderCrop(CallAdapter):
    """Cuts what an encoder-decoder model hands out of its encoder by the virtual tokens."""

    def __init__(self, size: int, pretrained: Any) -> None:
        super().__init__()
        self.size = size
        self._pretrained = Reference(pretrained)
        self.names = argument_names(pretrained)

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = bound(self.names, args, kwargs)
        return with_names(self._pretrained.module, run, call, lambda y: _crop(y, self._text, self._text, "encoder_"))

    def _text(self, x: Tensor, dim: int) -> Tensor:
        return extract(x, dim, x.shape[dim] - self.size)


def _crop(output: Any, queries: _Cut, keys: _Cut, prefix: str = "") -> Any:
    """``output`` with the text's part alone of whatever has a place for each token.

    Args:
        output: of a transformers model. What is none of those has no names, and stays as it is.
        queries: cuts what has a place for each token of the call.
        keys: the same for the tokens that are attended to.
        prefix: what names begin with, the others are left alone; but the encoder is also what a decoder attends to.
    """
    if not isinstance(output, dict):  # every ModelOutput is one
        return output
    fields = {}
    for name, value in output.items():
        kind = name.removeprefix(prefix) if name.startswith(prefix) else name if name == "cross_attentions" else ""
        fields[name] = _cropped(value, kind, queries, keys)
    return type(output)(**fields)


def _cropped(value: Any, kind: str, queries: _Cut, keys: _Cut) -> Any:
    if isinstance(value, tuple):
        return tuple(_cropped(item, kind, queries, keys) for item in value)
    if not isinstance(value, Tensor):
        return value
    # By name: a tensor's shape does not tell tokens from classes, and a pooled output has no place for each token.
    if kind in _SEQUENCES and value.dim() >= 3:
        return queries(value, -2)
    if kind in _SPANS:
        return queries(value, -1)
    if kind == "attentions":
        return keys(queries(value, -2), -1)
    return keys(value, -1) if kind == "cross_attentions" else value
