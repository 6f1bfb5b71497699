"""Models with virtual tokens, and what they are called with, for the tests of prompts."""

import copy
from collections.abc import Callable
from typing import Any

import tiny_models
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import PromptTuning, inject
from lightning_peft.methods.prompt_tuning import Prompt

VIRTUAL = 4
Build = Callable[..., nn.Module]
Batch = dict[str, Tensor]

CLASSES = {"labels": torch.tensor([0, 1])}
SPANS = {"start_positions": torch.tensor([1, 6]), "end_positions": torch.tensor([2, 0])}  # 6: no token, to be ignored
TOKENS = {"labels": torch.tensor([[0, 1, 1, 0, 1, 0], [1, -100, 0, 0, -100, -100]])}
WORDS = {"labels": torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, -100, -100]])}
CHOICE = {"labels": torch.tensor([1])}

HEADS: list[tuple[Build, type, Batch]] = [
    (tiny_models.bert, hf.BertModel, {}),
    (tiny_models.bert, hf.BertForSequenceClassification, CLASSES),
    (tiny_models.bert, hf.BertForTokenClassification, TOKENS),
    (tiny_models.bert, hf.BertForQuestionAnswering, SPANS),
    (tiny_models.bert, hf.BertForMultipleChoice, CHOICE),
    (tiny_models.bert, hf.BertForMaskedLM, WORDS),
    (tiny_models.bert, hf.BertForPreTraining, {**WORDS, "next_sentence_label": torch.tensor([0, 1])}),
    (tiny_models.roberta, hf.RobertaForSequenceClassification, CLASSES),
    (tiny_models.roberta, hf.RobertaForTokenClassification, TOKENS),
    (tiny_models.roberta, hf.RobertaForQuestionAnswering, SPANS),
    (tiny_models.roberta, hf.RobertaForMultipleChoice, CHOICE),
    (tiny_models.distilbert, hf.DistilBertForSequenceClassification, CLASSES),
    (tiny_models.distilbert, hf.DistilBertForTokenClassification, TOKENS),
    (tiny_models.distilbert, hf.DistilBertForQuestionAnswering, SPANS),
    (tiny_models.distilbert, hf.DistilBertForMultipleChoice, CHOICE),
    (tiny_models.deberta, hf.DebertaV2ForTokenClassification, TOKENS),
    (tiny_models.gpt2, hf.GPT2ForSequenceClassification, CLASSES),
    (tiny_models.gpt2, hf.GPT2ForTokenClassification, TOKENS),
    (tiny_models.gpt2, hf.GPT2ForQuestionAnswering, SPANS),
    (tiny_models.gpt2, hf.GPT2LMHeadModel, WORDS),
    (tiny_models.llama, hf.LlamaForSequenceClassification, CLASSES),
    (tiny_models.llama, hf.LlamaForTokenClassification, TOKENS),
    (tiny_models.llama, hf.LlamaForQuestionAnswering, SPANS),
    (tiny_models.llama, hf.LlamaForCausalLM, WORDS),
    (tiny_models.t5, hf.T5ForConditionalGeneration, WORDS),
    (tiny_models.t5, hf.T5ForSequenceClassification, CLASSES),
    (tiny_models.t5, hf.T5ForQuestionAnswering, SPANS),
    (tiny_models.t5, hf.T5ForTokenClassification, TOKENS),
    (tiny_models.bart, hf.BartForConditionalGeneration, WORDS),
    (tiny_models.bart, hf.BartForSequenceClassification, CLASSES),
    (tiny_models.bart, hf.BartForQuestionAnswering, SPANS),
]


def prompted(build: Build, head: type | None = None, *names: str, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """A model with prompts, in eval mode, and the same without."""
    base = (build(head, **fields) if head else build(**fields)).eval()
    model = copy.deepcopy(base)
    for name in names or ("default",):
        inject(model, PromptTuning(num_virtual_tokens=VIRTUAL, modules_to_save=None), name)
    return model, base


def prompt_of(model: nn.Module) -> Tensor:
    """The vectors, (VIRTUAL, d)."""
    return next(module for module in model.modules() if isinstance(module, Prompt)).embedding


def text(head: type) -> Batch:
    """Two rows, the second two tokens shorter, each with one end of a sentence (1 for T5, 2 for BART)."""
    end = 2 if head.__name__.startswith("Bart") else 1
    ids = torch.tensor([[9, 7, 12, 33, 21, end], [8, 7, 5, end, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return {key: x[None] for key, x in batch.items()} if "MultipleChoice" in head.__name__ else batch
