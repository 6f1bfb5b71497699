"""Finding what is new in a transformers model: its task head."""

from collections.abc import Callable

import pytest
import tiny_models
import transformers as hf
from torch import nn

from lightning_peft.network.pretrained import outside_base, task_heads

HEADS: list[tuple[Callable[..., nn.Module], type, list[str]]] = [
    (tiny_models.bert, hf.BertForSequenceClassification, ["classifier"]),
    (tiny_models.bert, hf.BertForTokenClassification, ["classifier"]),
    (tiny_models.bert, hf.BertForQuestionAnswering, ["qa_outputs"]),
    (tiny_models.roberta, hf.RobertaForSequenceClassification, ["classifier"]),
    (tiny_models.distilbert, hf.DistilBertForSequenceClassification, ["pre_classifier", "classifier"]),
    (tiny_models.deberta, hf.DebertaV2ForSequenceClassification, ["pooler", "classifier"]),
    (tiny_models.gpt2, hf.GPT2ForSequenceClassification, ["score"]),
    (tiny_models.gpt2, hf.GPT2ForTokenClassification, ["classifier"]),
    (tiny_models.gpt2, hf.GPT2ForQuestionAnswering, ["qa_outputs"]),
    (tiny_models.llama, hf.LlamaForSequenceClassification, ["score"]),
    (tiny_models.t5, hf.T5ForSequenceClassification, ["classification_head"]),
    (tiny_models.t5, hf.T5ForTokenClassification, ["classifier"]),
    (tiny_models.t5, hf.T5ForQuestionAnswering, ["qa_outputs"]),
    (tiny_models.bart, hf.BartForSequenceClassification, ["classification_head"]),
    (tiny_models.vit, hf.ViTForImageClassification, ["classifier"]),
]
NONE: list[tuple[Callable[..., nn.Module], type]] = [
    (tiny_models.gpt2, hf.GPT2LMHeadModel),
    (tiny_models.llama, hf.LlamaForCausalLM),
    (tiny_models.t5, hf.T5ForConditionalGeneration),
    (tiny_models.bart, hf.BartForConditionalGeneration),
    (tiny_models.whisper, hf.WhisperForConditionalGeneration),
    (tiny_models.bert, hf.BertForMaskedLM),
    (tiny_models.bert, hf.BertModel),
    (tiny_models.t5, hf.T5EncoderModel),
    (tiny_models.clip_text, hf.CLIPTextModel),
]


@pytest.mark.parametrize(("build", "head", "expected"), HEADS, ids=[head.__name__ for _, head, _ in HEADS])
def test_the_head_of_a_task_is_found(build: Callable[..., nn.Module], head: type, expected: list[str]) -> None:
    assert task_heads(build(head)) == expected


@pytest.mark.parametrize(("build", "head"), NONE, ids=[head.__name__ for _, head in NONE])
def test_pretrained_models_have_no_task_head(build: Callable[..., nn.Module], head: type) -> None:
    assert task_heads(build(head)) == []


def test_a_network_of_plain_torch_has_no_task_head() -> None:
    assert task_heads(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    assert outside_base(nn.ModuleDict({"classifier": nn.Linear(2, 2)})) == []


def test_heads_are_found_inside_the_users_module() -> None:
    assert task_heads(nn.ModuleDict({"student": tiny_models.bert(), "metric": nn.Linear(2, 2)})) == [
        "student.classifier"
    ]


def test_two_models_have_two_heads() -> None:
    pair = nn.ModuleDict({"a": tiny_models.bert(), "b": tiny_models.gpt2(hf.GPT2ForSequenceClassification)})
    assert task_heads(pair) == ["a.classifier", "b.score"]


def test_a_sequential_head_is_one_head() -> None:
    model = tiny_models.bert()
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 2))
    assert task_heads(model) == ["classifier"]


@pytest.mark.parametrize(
    ("build", "head", "expected"),
    [
        (tiny_models.gpt2, hf.GPT2LMHeadModel, "lm_head"),
        (tiny_models.llama, hf.LlamaForCausalLM, "lm_head"),
        (tiny_models.whisper, hf.WhisperForConditionalGeneration, "proj_out"),
        (tiny_models.bert, hf.BertForMaskedLM, "cls.predictions.decoder"),
    ],
)
def test_output_embeddings_are_outside_the_base(build: Callable[..., nn.Module], head: type, expected: str) -> None:
    assert expected in outside_base(build(head))
