"""Rows that begin with padding: behind virtual tokens, each gives what it gives alone."""

from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers as hf
from prompting.prompted import VIRTUAL, Build, prompt_of, prompted
from torch import Tensor

from lightning_peft.prompting.padding import extract, insert, left_padding, overwrite

IDS = torch.tensor([[9, 7, 12, 33, 21, 8], [0, 0, 8, 7, 5, 11], [0, 8, 7, 6, 0, 0]])
MASK = (IDS != 0).long()
RELATIVE = (tiny_models.llama, tiny_models.gemma3, tiny_models.mistral)  # know no absolute places


def _alone(row: int) -> tuple[Tensor, slice]:
    """The text of one row, and where it stands."""
    inside = MASK[row].nonzero()
    place = slice(int(inside.min()), int(inside.max()) + 1)
    return IDS[row : row + 1, place], place


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3), torch.tensor([[1, 0, 1], [1, 1, 0]])])
def test_rows_that_begin_with_text_have_no_padding(mask: Tensor | None) -> None:
    assert left_padding(mask) is None


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float])
def test_padding_is_counted_to_the_first_token_of_each_row(dtype: torch.dtype) -> None:
    mask = torch.tensor([[[0, 0, 1, 0], [1, 0, 1, 1]], [[0, 0, 0, 0], [0, 1, 1, 0]]]).to(dtype)
    assert torch.equal(left_padding(mask), torch.tensor([[[2], [0]], [[4], [1]]]))


def test_what_is_inserted_stands_behind_the_padding_and_can_be_overwritten_and_taken_out() -> None:
    x = torch.arange(1, 9).view(2, 4)
    part = torch.tensor([[-1, -2, -3]]).expand(2, 3)
    padding = torch.tensor([[2], [0]])
    inserted = insert(x, part, padding)
    assert inserted.tolist() == [[1, 2, -1, -2, -3, 3, 4], [-1, -2, -3, 5, 6, 7, 8]]
    assert torch.equal(extract(inserted, -1, 4, padding), x)
    ten = torch.tensor([1, 10])
    features = inserted[..., None] * ten
    assert torch.equal(insert(x[..., None] * ten, part[..., None] * ten, padding, -2), features)
    assert torch.equal(insert(x[0], part[0], padding), torch.cat([part[0], x[0]]))  # of no row
    written = overwrite(features, torch.tensor([[7, 70], [8, 80]]).expand(2, 2, 2), 1, padding)
    assert written[..., 0].tolist() == [[1, 2, -1, 7, 8, 3, 4], [-1, 7, 8, 5, 6, 7, 8]]
    assert torch.equal(written[..., 1], written[..., 0] * 10)


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
@pytest.mark.parametrize("build", RELATIVE)
def test_a_row_gives_what_it_gives_alone(build: Build, names: list[str], embedded: bool) -> None:
    model, _ = prompted(build, None, *names, attn_implementation="eager")
    seen: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    text = {"inputs_embeds": model.get_input_embeddings()(IDS)} if embedded else {"input_ids": IDS}
    together = model(**text, attention_mask=MASK, **seen)
    assert together.logits.shape[:2] == IDS.shape
    for row in range(3):
        ids, place = _alone(row)
        alone = model(ids, **seen)
        for found, expected in (
            (together.logits, alone.logits),
            (together.hidden_states[-1], alone.hidden_states[-1]),
            (together.attentions[-1][:, :, place].transpose(1, 3), alone.attentions[-1].transpose(1, 3)),
        ):
            torch.testing.assert_close(found[row : row + 1, place], expected, rtol=1e-4, atol=1e-5)
        # What the virtual tokens are given does not show up at the padding.
        assert not together.attentions[-1][row, :, place, : place.start].any()


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gemma3])
def test_the_loss_is_that_of_the_rows(build: Build) -> None:
    model, _ = prompted(build)
    labels = IDS.masked_fill(MASK == 0, -100)
    losses = [model(ids, labels=ids).loss * ids.numel() for ids in (_alone(row)[0] for row in range(3))]
    together = model(IDS, attention_mask=MASK, labels=labels).loss
    torch.testing.assert_close(together, sum(losses) / MASK.sum(), rtol=1e-5, atol=1e-5)


def test_places_are_those_of_the_text() -> None:
    model, base = prompted(tiny_models.gpt2, hf.GPT2ForQuestionAnswering)
    embedded, vectors = base.get_input_embeddings()(IDS), prompt_of(model)
    begins = [0, 2, 1]
    scores = base(
        inputs_embeds=torch.stack([torch.cat([x[:n], vectors, x[n:]]) for x, n in zip(embedded, begins, strict=True)]),
        attention_mask=torch.stack(
            [torch.cat([x[:n], torch.ones(4), x[n:]]) for x, n in zip(MASK, begins, strict=True)]
        ),
    )
    starts, ends = torch.tensor([1, 2, 0]), torch.tensor([[5], [4], [3]])  # in the last row, one at the padding
    output = model(IDS, attention_mask=MASK, start_positions=starts, end_positions=ends)
    by_hand = F.cross_entropy(scores.start_logits, torch.tensor([5, 6, 0]))
    by_hand += F.cross_entropy(scores.end_logits, torch.tensor([9, 8, 7]))
    torch.testing.assert_close(output.loss, by_hand / 2)
    for row, n in enumerate(begins):
        expected = torch.cat([scores.start_logits[row, :n], scores.start_logits[row, n + VIRTUAL :]])
        torch.testing.assert_close(output.start_logits[row], expected)


def test_choices_that_begin_with_padding() -> None:
    model, _ = prompted(tiny_models.gpt2, hf.GPT2DoubleHeadsModel)
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    last = torch.tensor([[5, 5, 3]])
    output = model(IDS[None], attention_mask=MASK[None], position_ids=positions, mc_token_ids=last)
    for row in range(3):
        ids, place = _alone(row)
        alone = model(ids[None], mc_token_ids=torch.tensor([[ids.shape[1] - 1]]))
        torch.testing.assert_close(output.mc_logits[:, row : row + 1], alone.mc_logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.logits[:, row : row + 1, place], alone.logits, rtol=1e-4, atol=1e-5)


def test_the_vectors_learn_from_every_row() -> None:
    model, _ = prompted(tiny_models.llama)
    learned = prompt_of(model)
    model(IDS, attention_mask=MASK).logits[MASK.bool()].square().sum().backward()
    together, learned.grad = learned.grad, None
    for row in range(3):
        model(_alone(row)[0]).logits.square().sum().backward()
    assert learned.grad.shape == (VIRTUAL, 16)
    torch.testing.assert_close(together, learned.grad, rtol=1e-4, atol=1e-5)


def test_compiled_it_is_the_same_with_and_without_padding() -> None:
    model, _ = prompted(tiny_models.llama)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mask in (MASK, MASK.roll(-1, 1)):
        with torch.no_grad():
            found, expected = (run(IDS, attention_mask=mask).logits[mask.bool()] for run in (compiled, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
