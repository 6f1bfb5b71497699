"""Rows of tokens train as they would in plain torch, without the rest of their table."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from plain_training import IDS, Run, logits, masked, randomise, trained, translated
from snapshot import assert_identical
from torch import Tensor, nn

from lightning_peft import SelectiveTuning, disabled, inject, merge, remove
from lightning_peft.errors import NotApplicableError, NotMergeableError, TargetError


class Bag(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 6, **fields), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh().mean(1))


def _bag(model: nn.Module) -> Tensor:
    return model(IDS.int())


def _masked_lm() -> nn.Module:
    return tiny_models.bert(hf.BertForMaskedLM)


TABLES: dict[str, tuple[Callable[[], nn.Module], Run, str]] = {
    # the network, how to run it, and the first name of its table
    "llama, tied": (tiny_models.llama, logits, "model.embed_tokens.weight"),
    "llama": (lambda: tiny_models.llama(tie_word_embeddings=False), logits, "model.embed_tokens.weight"),
    "gpt2, tied": (tiny_models.gpt2, logits, "transformer.wte.weight"),
    "t5, tied": (tiny_models.t5, translated, "shared.weight"),
    "bart, tied": (tiny_models.bart, translated, "model.shared.weight"),
    "bart, scaled": (lambda: tiny_models.bart(scale_embedding=True), translated, "model.shared.weight"),
    "gemma3, scaled": (tiny_models.gemma3, logits, "model.embed_tokens.weight"),
    "bert": (tiny_models.bert, logits, "bert.embeddings.word_embeddings.weight"),
    "masked language model": (_masked_lm, logits, "bert.embeddings.word_embeddings.weight"),
    "plain": (Bag, _bag, "table.weight"),
    "padding": (lambda: Bag(padding_idx=5), _bag, "table.weight"),
    "by frequency": (lambda: Bag(scale_grad_by_freq=True), _bag, "table.weight"),
}


@pytest.mark.parametrize("case", TABLES)
def test_rows_train_as_those_of_the_table_itself(case: str) -> None:
    build, run, name = TABLES[case]
    model = build().eval()
    randomise(model)
    tokens = [9, 5, 11, 4]
    mask = torch.zeros(len(model.get_parameter(name)), 1).index_fill_(0, torch.tensor(tokens), 1)
    expected = masked(model, {name: mask})
    before = model.get_parameter(name).detach().clone()
    report = inject(model, SelectiveTuning(token_ids=tokens, modules_to_save=None))
    assert report.trainable == 4 * before.shape[1]
    torch.testing.assert_close(run(model), run(expected))
    losses = trained(expected, run, weight_decay=0)
    assert losses[2] != losses[0]
    torch.testing.assert_close(torch.tensor(trained(model, run, weight_decay=0)), torch.tensor(losses))
    after = run(model)
    torch.testing.assert_close(after, run(expected), rtol=1e-3, atol=1e-5)
    with disabled(model):
        assert (run(model) - after).abs().max() > 1e-3
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_parameter(name)]
    merge(model)
    torch.testing.assert_close(run(model), after, rtol=1e-5, atol=1e-5)
    moved = (model.get_parameter(name) != before).any(1).nonzero().flatten().tolist()
    assert set(moved) <= set(tokens)
    assert len(moved) == (4 if len(tied) > 1 else 3 - (case == "padding"))  # 11 is not in the input
    assert all(model.get_parameter(n) is model.get_parameter(name) for n in tied)


@pytest.mark.parametrize("fields", [{}, {"padding_idx": 4}, {"scale_grad_by_freq": True}, {"max_norm": 0.7}])
def test_the_gradient_of_a_row_is_that_of_the_table(fields: dict[str, Any]) -> None:
    ids = torch.tensor([[4, 4, 4, 9], [9, 1, 2, 4]])
    model = Bag(**fields)
    expected = copy.deepcopy(model)
    expected(ids).square().sum().backward()
    inject(model, SelectiveTuning(token_ids=[9, 4, 7]))
    model(ids).square().sum().backward()
    found = model.table.peft.get_submodule("default:weight").values.grad
    torch.testing.assert_close(found, expected.table.weight.grad[[4, 7, 9]])
    assert found.any(1).tolist() == ["padding_idx" not in fields, False, True]


def test_a_table_is_not_copied_in_the_forward_pass() -> None:
    """Only what is looked up, and what is scored, is made: tables of language models have gigabytes."""
    model = tiny_models.llama(vocab_size=5000).eval()
    inject(model, SelectiveTuning(token_ids=[3, 4]))
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        logits(model)
    table = model.lm_head.weight
    assert max(n for n in sizes if n != table.numel()) < table.numel() / 2


def test_other_fields_choose_further_parameters() -> None:
    model = tiny_models.llama()
    report = inject(model, SelectiveTuning(token_ids=[3], target_modules=["q_proj", "embed_tokens"], layers=None))
    assert report.trainable == 16 + 2 * 16 * 16
    model = tiny_models.llama(tie_word_embeddings=False)
    assert inject(model, SelectiveTuning(token_ids=[3], parameter_types=["norm"])).trainable == 16 + 5 * 16


def test_rows_train_at_one_place_where_the_other_is_excluded() -> None:
    model = tiny_models.llama()
    report = inject(model, SelectiveTuning(token_ids=[3, 7], exclude_modules=["lm_head"]))
    assert [(row.host, row.trainable) for row in report.hosts] == [("model.embed_tokens", 32)]
    with pytest.raises(NotMergeableError, match=r"'model\.embed_tokens\.weight' is tied to 'lm_head\.weight'"):
        merge(model)


def test_the_table_of_a_plain_network_is_named_or_the_only_one() -> None:
    tables = nn.ModuleDict({"words": nn.Embedding(9, 4), "places": nn.Embedding(9, 3)})
    assert inject(tables, SelectiveTuning(token_ids=[0, 8], target_modules=["words"])).trainable == 8
    remove(tables)
    with pytest.raises(TargetError, match="tokens could belong to 'words', 'places': name one of them"):
        inject(tables, SelectiveTuning(token_ids=[0]))
    assert inject(nn.Embedding(9, 4), SelectiveTuning(token_ids=[0])).trainable == 4
    with pytest.raises(NotApplicableError, match="Linear has no embedding whose rows could train"):
        inject(nn.Linear(2, 2), SelectiveTuning(token_ids=[0]))


def test_the_order_in_which_tokens_are_named_does_not_matter() -> None:
    model = Bag()
    inject(model, SelectiveTuning(token_ids=[7, 2, 5]))
    adapter = model.table.peft.get_submodule("default:weight")
    assert adapter.index.tolist() == [2, 5, 7]
    assert_identical(adapter.values.detach(), model.table.weight.detach()[[2, 5, 7]])
