"""Virtual tokens before a text: what a caller gets back, on every head."""

from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers as hf
from prompting.prompted import CHOICE, HEADS, VIRTUAL, Batch, Build, prompt_of, prompted, text
from torch import Tensor

each_head = pytest.mark.parametrize(("build", "head", "targets"), HEADS, ids=[head.__name__ for _, head, _ in HEADS])


def _shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, dict):
        return {name: _shapes(value) for name, value in output.items()}
    return [_shapes(value) for value in output] if isinstance(output, tuple) else type(output)


@each_head
def test_the_caller_gets_the_lengths_that_were_sent(build: Build, head: type, targets: Batch) -> None:
    model, base = prompted(build, head, attn_implementation="eager")
    call = {**text(head), **targets, "output_hidden_states": True, "output_attentions": True}
    expected, found = base(**call), model(**call)
    assert type(found) is type(expected)
    assert _shapes(found) == _shapes(expected)
    for name, value in found.items():
        if name.endswith("logits"):
            assert not torch.equal(value, expected[name])
            value.view(-1)  # contiguous as the model's own: a loss may look at it in another shape


@each_head
def test_as_a_tuple_it_is_the_same(build: Build, head: type, targets: Batch) -> None:
    model, base = prompted(build, head, attn_implementation="eager")
    call = {**text(head), **targets, "output_hidden_states": True, "output_attentions": True}
    found = model(**call, return_dict=False)
    assert type(found) is tuple
    assert _shapes(found) == _shapes(base(**call, return_dict=False))
    for mine, expected in zip(found, model(**call).to_tuple(), strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    ("build", "head", "targets"),
    [case for case in HEADS if case[2] is not CHOICE],  # whose rows are the choices of one question
    ids=[head.__name__ for _, head, targets in HEADS if targets is not CHOICE],
)
def test_a_padded_row_gives_what_it_gives_alone(build: Build, head: type, targets: Batch) -> None:
    model, _ = prompted(build, head)
    batch = text(head)
    if model.config.is_encoder_decoder and "labels" in targets and targets["labels"].dim() == 2:
        batch["decoder_input_ids"] = torch.tensor([[0, 9, 8, 7], [0, 11, 12, 0]])
    together = model(**batch)
    for row, length in ((0, 6), (1, 4)):
        alone = model(**{name: x[row : row + 1, :length] for name, x in batch.items()})
        for name in ("logits", "start_logits", "end_logits", "last_hidden_state"):
            if name in alone:
                # scores of classes are (rows, classes), those of tokens (rows, tokens, ...)
                expected = together[name][row : row + 1]
                expected = expected[:, : alone[name].shape[1]]
                torch.testing.assert_close(alone[name], expected, rtol=1e-4, atol=1e-5)


EMBEDDED: list[tuple[Build, type]] = [
    (tiny_models.bert, hf.BertModel),
    (tiny_models.roberta, hf.RobertaForTokenClassification),
    (tiny_models.distilbert, hf.DistilBertForSequenceClassification),
    (tiny_models.deberta, hf.DebertaV2ForTokenClassification),
    (tiny_models.gpt2, hf.GPT2LMHeadModel),
    (tiny_models.llama, hf.LlamaForCausalLM),
    (tiny_models.gemma3, hf.Gemma3ForCausalLM),
    (tiny_models.mistral, hf.MistralForCausalLM),
    (tiny_models.t5, hf.T5ForConditionalGeneration),
    (tiny_models.bart, hf.BartForConditionalGeneration),
]


@pytest.mark.parametrize(("build", "head"), EMBEDDED)
def test_it_is_the_model_called_with_embedded_tokens_behind_the_vectors(build: Build, head: type) -> None:
    model, base = prompted(build, head)
    ids, mask = text(head).values()
    goal = {"decoder_input_ids": ids[:, :3]} if base.config.is_encoder_decoder else {}
    vectors = prompt_of(model).expand(2, -1, -1)
    expected = base(
        inputs_embeds=torch.cat([vectors, base.get_input_embeddings()(ids)], 1),
        attention_mask=F.pad(mask, (VIRTUAL, 0), value=1),
        **goal,
    )[0]
    found = model(input_ids=ids, attention_mask=mask, **goal)[0]
    if not goal and found.dim() == 3:
        expected = expected[:, VIRTUAL:]
        # Of padding, RoBERTa knows from the ids alone, where its positions differ.
        found, expected = found[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_loss_of_token_classification_is_that_of_the_labelled_tokens() -> None:
    for build, head, targets in HEADS:
        if head.__name__.endswith("TokenClassification"):
            output = prompted(build, head)[0](**text(head), **targets)
            expected = F.cross_entropy(output.logits.view(-1, 2), targets["labels"].view(-1))
            torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(
    ("build", "head"),
    [(tiny_models.bert, hf.BertForQuestionAnswering), (tiny_models.gpt2, hf.GPT2ForQuestionAnswering)],
)
def test_the_loss_of_question_answering_is_that_of_the_sent_positions(build: Build, head: type) -> None:
    model, base = prompted(build, head)
    ids, mask = text(head).values()
    starts, ends = torch.tensor([1, 6]), torch.tensor([-1, 3])
    output = model(input_ids=ids, attention_mask=mask, start_positions=starts, end_positions=ends)
    vectors = prompt_of(model).expand(2, -1, -1)
    scores = base(
        inputs_embeds=torch.cat([vectors, base.get_input_embeddings()(ids)], 1),
        attention_mask=F.pad(mask, (VIRTUAL, 0), value=1),
    )
    # Virtual tokens compete with those of the text. Models take -1 for the first token, and ignore what is behind all.
    by_hand = F.cross_entropy(scores.start_logits[:1], torch.tensor([VIRTUAL + 1]))
    by_hand += F.cross_entropy(scores.end_logits, torch.tensor([VIRTUAL + 0, VIRTUAL + 3]))
    torch.testing.assert_close(output.loss, by_hand / 2)
    torch.testing.assert_close(output.start_logits, scores.start_logits[:, VIRTUAL:])


@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.llama, tiny_models.gemma3])
def test_the_loss_of_a_language_model_is_that_of_the_text(build: Build) -> None:
    model, base = prompted(build)
    batch = text(type(model))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    within = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    # The last virtual token tells the first one of the text, which a text alone does not learn.
    ids = batch["input_ids"]
    first = model(input_ids=torch.cat([ids[:, :1], ids], 1))  # any token: only virtual ones are read here
    assert first.logits.shape[1] == 7
    count = (labels != -100).sum()
    behind_prompt = output.loss * count - within
    assert behind_prompt > 0
    with torch.no_grad():
        vectors = prompt_of(model).expand(2, -1, -1)
        base = prompted(build)[1]
        base.load_state_dict({k: v for k, v in model.state_dict().items() if ".peft." not in f".{k}"})
        told = base(inputs_embeds=vectors).logits[:, -1]
    torch.testing.assert_close(
        behind_prompt, F.cross_entropy(told, labels[:, 0], reduction="sum"), rtol=1e-4, atol=1e-4
    )


def test_of_two_choices_the_loss_is_that_of_the_right_one() -> None:
    for build, head, targets in HEADS:
        if head.__name__.endswith("MultipleChoice"):
            output = prompted(build, head)[0](**text(head), **targets)
            assert output.logits.shape == (1, 2)
            torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, targets["labels"]))
