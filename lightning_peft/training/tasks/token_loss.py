"""The loss of a language model without its logits, which would be the largest tensor of a step by far.

The model runs as it is, but its head hands the hidden states on, so whatever surrounds the head (virtual tokens cut
away, for one) happens to these. Then the head is run on a few tokens at a time, and only on tokens that have a label.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.network.walk import CHILD
from lightning_peft.training.modes import in_eval

IGNORED = -100  # the label that says nothing, as in transformers
_PARTS = 16  # at most a sixteenth of the logits is there at a time,
_LEAST = 64  # but not for fewer tokens than this: reading the head's weight would take longer than using it

LossForm = Literal["chunks", "logits", "own"]
"""How to compute the loss. ``"chunks"``: as the cross-entropy of the head's output, a chunk at a time; ``"logits"``: as
the cross-entropy of the logits, where the model changes that output; ``"own"``: the model's own, which is more."""


def next_tokens(labels: Tensor) -> Tensor:
    """What each token of ``labels`` (rows, tokens) is to predict: the label after it, at the end of a row nothing."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


def without_first(labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """``labels`` without the first token of each text, which no token of the text predicts.

    Behind virtual tokens it could be; but then losses of different methods would be of different tokens.

    Args:
        labels: (rows, tokens).
        position_ids: the same shape, from 0 in each text, where a row holds several.
    """
    first = torch.arange(labels.shape[-1], device=labels.device) == 0 if position_ids is None else position_ids == 0
    return labels.masked_fill(first, IGNORED)


def chunked_cross_entropy(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The mean of the cross-entropy of ``head(hidden)`` over the tokens that have a label; 0 if none has.

    Args:
        head: maps (n, features) to (n, vocabulary), each token by itself. Its hooks and adapters act.
        hidden: (..., features).
        labels: (...), the classes, or -100.
    """
    hidden, labels = _labelled(hidden, labels)
    if not len(labels):
        return hidden.sum()  # 0, and a backward through it finds its way
    if _is_plain(head, hidden):
        weights: Any = head._parameters
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=_chunk_size(labels))
        return F.linear_cross_entropy(hidden, weights["weight"], labels, linear_bias=weights["bias"], options=options)
    size = _chunk_size(labels) // 2  # the backward of each holds its logits, their softmax and the gradient at once
    parts = [
        checkpoint(_summed_loss, head, x, y, use_reentrant=False)
        for x, y in zip(hidden.split(size), labels.split(size), strict=True)
    ]
    return torch.stack(parts).sum() / len(labels)


@torch.no_grad()
def count_tokens(head: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross-entropy, how many labels ``head`` puts first, and how many there are.

    Args:
        head: maps (n, features) to (n, vocabulary), each token by itself. Its hooks and adapters act.
        hidden: (..., features).
        labels: (...), the classes, or -100.
    """
    hidden, labels = _labelled(hidden, labels)
    loss, right = hidden.new_zeros((), dtype=torch.float32), labels.new_zeros(())
    size = _chunk_size(labels) // 2
    for x, y in zip(hidden.split(size), labels.split(size), strict=True):
        logits = head(x).float()
        loss += F.cross_entropy(logits, y, reduction="sum")
        right += (logits.argmax(-1) == y).sum()
    return loss, right, labels.new_tensor(len(labels))


@contextmanager
def transparent(head: nn.Module) -> Iterator[None]:
    """Within the ``with`` block, let ``head`` put out its input (rows, tokens, features), and work on no token."""
    caught: list[Tensor] = []

    def catch(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0])
        return (args[0][..., :0, :], *args[1:])

    def hand_on(head: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return caught.pop()

    # The first hook before the head and the last behind it: adapters of the head see no token in between.
    handles = head.register_forward_pre_hook(catch, prepend=True), head.register_forward_hook(hand_on)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def loss_form(model: Any, shifted: bool) -> LossForm:
    """How to come by the loss of a transformers language model.

    Some soften or scale what comes from the head, some add to the loss, and some want labels that are shifted already.
    A head that puts out a tensor of our own for a few tokens tells: does the model put out that very tensor, and what
    is the loss of these logits?

    Args:
        model: the model; its modes and its hooks are left as they were, and no random number is drawn.
        shifted: True if a token is to predict the label after its own (and not the one in its place, as in a decoder
            that reads other tokens than the labels).
    """
    head = model.get_output_embeddings()
    if head is None:
        return "logits"
    ids = torch.arange(1, 5, device=next(model.parameters()).device)[None]
    answers: list[Tensor] = []

    def answer(head: nn.Module, args: Any, output: Tensor) -> Tensor:
        scores = torch.linspace(-4, 4, output.shape[-1], device=output.device).to(output.dtype)
        answers.append(scores.expand_as(output).contiguous())
        return answers[-1]

    handle = head.register_forward_hook(answer)
    try:
        with torch.no_grad(), in_eval(model):
            # By its class: virtual tokens before a text would be cut away behind the model, from copies.
            output = type(model).forward(model, input_ids=ids, labels=ids, use_cache=False)
    finally:
        handle.remove()
    # Where the loss does not shift the labels it is not ours, which are the tokens themselves; but it is nothing else.
    known = [ids] if not shifted else [next_tokens(ids), ids]
    expected = [F.cross_entropy(output.logits[0].float(), labels[0]) for labels in known]
    if not any(torch.isclose(output.loss.float(), loss, rtol=1e-5) for loss in expected):
        return "own"
    return "chunks" if len(answers) == 1 and output.logits is answers[0] else "logits"


def run_to_head(model: Any, inputs: Mapping[str, Any], form: LossForm) -> tuple[nn.Module, Tensor]:
    """Run a transformers language model on ``inputs``; return what is left to run for the logits, and its input."""
    head = model.get_output_embeddings()
    if form != "chunks" or not splits_by_token(head):
        return nn.Identity(), model(**inputs, use_cache=False).logits
    with transparent(head):
        return head, model(**inputs, use_cache=False).logits


def splits_by_token(head: nn.Module) -> bool:
    """True if the adapters of ``head`` act on each token by itself, so that it can be run on some at a time."""
    slots: Any = head._modules.get(CHILD)
    return slots is None or not slots.needs_whole_sequences()


def _labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    kept = labels != IGNORED
    return hidden[kept], labels[kept]


def _chunk_size(labels: Tensor) -> int:
    return max(_LEAST, -(-len(labels) // _PARTS))


def _summed_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum")


def _is_plain(head: Any, hidden: Tensor) -> bool:
    """True if torch's own function computes what a call of ``head`` would, and as exactly."""
    return (
        type(head) is nn.Linear
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
        # Of 16-bit numbers it adds the losses up in 16 bits.
        and hidden.dtype == head.weight.dtype
        and hidden.dtype.itemsize >= 4
        and not torch.is_autocast_enabled(hidden.device.type)
    )
