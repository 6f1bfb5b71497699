"""Prompt tuning: where a prompt starts, what trains, and what is refused."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

from lightning_peft import PromptTuning, inject, load_adapter, save_adapter
from lightning_peft.checkpoints.ckpt import adapter_state
from lightning_peft.errors import ConfigError, NotApplicableError

IDS = torch.tensor([[9, 7, 12, 33, 21, 8], [8, 7, 5, 11, 3, 4]])


def _prompt(model: nn.Module, **fields: Any) -> Tensor:
    """The prompt that a method starts from on ``model``."""
    inject(model, PromptTuning(**{"num_virtual_tokens": 6, "modules_to_save": None, **fields}))
    (prompt,) = adapter_state(model).values()
    return prompt


def _rows_of(prompt: Tensor, table: Tensor) -> list[int]:
    """Which row of ``table`` each vector is; fails unless each is one."""
    same = (prompt[:, None] == table[None]).all(-1)
    assert same.any(1).all()
    return same.int().argmax(1).tolist()


def test_from_the_vocabulary_each_vector_is_a_row_of_the_table() -> None:
    model = tiny_models.bert(vocab_size=500, max_position_embeddings=500)
    rows = _rows_of(_prompt(model, num_virtual_tokens=300), model.get_input_embeddings().weight)
    assert len(set(rows)) > 200  # drawn at random from all of them
    assert max(rows) > 450
    assert min(rows) < 50


def test_a_copy_of_the_table_not_a_view_of_it() -> None:
    model = tiny_models.bert()
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    with torch.no_grad():
        _prompt(model).add_(1)
    assert torch.equal(table, before)


def test_at_random_the_vectors_are_as_large_as_the_tables() -> None:
    model = tiny_models.bert(hidden_size=64, num_attention_heads=2, vocab_size=900, max_position_embeddings=999)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table.mul_(3).add_(0.5)
    prompt = _prompt(model, init="random", num_virtual_tokens=800)
    assert prompt.mean().item() == pytest.approx(table.mean().item(), abs=0.02)
    assert prompt.std().item() == pytest.approx(table.std().item(), rel=0.03)
    assert not (prompt[:, None] == table[None, :50]).all(-1).any()


@pytest.mark.parametrize("init", ["vocabulary", "random"])
@pytest.mark.parametrize(
    ("build", "scale"), [(tiny_models.gemma3, 4.0), (lambda: tiny_models.bart(scale_embedding=True), 4.0)]
)
def test_where_a_model_scales_its_embeddings_a_prompt_is_as_large_as_they_are(
    build: Any, scale: float, init: str
) -> None:
    model = build()  # times the root of its width, 16
    embedding = (
        model.get_encoder().get_input_embeddings() if model.config.is_encoder_decoder else model.model.embed_tokens
    )
    seen = embedding(torch.arange(40))
    torch.testing.assert_close(seen, embedding.weight * scale)
    prompt = _prompt(model, init=init, num_virtual_tokens=15)
    if init == "vocabulary":
        _rows_of(prompt, seen)
    assert prompt.std().item() == pytest.approx(seen.std().item(), rel=0.25)


@pytest.mark.parametrize(
    ("size", "words"), [(2, ["film", "was"]), (3, ["film", "was", "fine"]), (7, ["film", "was", "fine"] * 2 + ["film"])]
)
def test_from_a_text_it_is_repeated_or_cut(tiny_text_model: Path, size: int, words: list[str]) -> None:
    model = hf.BertModel.from_pretrained(tiny_text_model)
    fields = {"init": "text", "init_text": "film was fine", "tokenizer": str(tiny_text_model)}
    rows = _rows_of(_prompt(model, num_virtual_tokens=size, **fields), model.get_input_embeddings().weight)
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_text_model)
    assert tokenizer.convert_ids_to_tokens(rows) == words  # without the special tokens of a whole text


def test_a_text_that_makes_no_tokens_or_unknown_ones_is_refused(tiny_text_model: Path) -> None:
    for model, text in ((tiny_models.bert(), " "), (tiny_models.bert(vocab_size=8), "film was fine")):
        before = Snapshot(model)
        with pytest.raises(ConfigError, match=r"makes \d tokens of .*, the largest .*; the model knows \d+"):
            _prompt(model, init="text", init_text=text, tokenizer=str(tiny_text_model))
        before.assert_same(model)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_models.bert()
    before = Snapshot(model)
    with pytest.raises(ConfigError, match=r"PromptTuning\.tokenizer: .*nowhere' cannot be loaded"):
        _prompt(model, init="text", init_text="film", tokenizer=str(tmp_path / "nowhere"))
    before.assert_same(model)


@pytest.mark.parametrize("init", ["vocabulary", "random"])
def test_a_seed_makes_it_again(init: str) -> None:
    prompts = []
    for seed in (1, 1, 2):
        model = tiny_models.bert(tie_word_embeddings=True)
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(torch.arange(640).view(40, 16) / 640)
        torch.manual_seed(seed)
        prompts.append(_prompt(model, init=init))
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])


def test_beside_a_table_of_16_bits_a_prompt_is_of_32() -> None:
    for init in ("vocabulary", "random"):
        model = tiny_models.gpt2().bfloat16()
        assert _prompt(model, init=init).dtype == torch.float32
        assert model(IDS).logits.dtype == torch.bfloat16


def test_the_prompt_alone_trains_and_comes_back_exactly() -> None:
    model = tiny_models.bert().eval()
    inject(model, PromptTuning(num_virtual_tokens=5))
    training = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert training.pop("peft.default.prompt.embedding") == 80
    assert all(name.startswith("classifier.") for name in training)
    assert sum(training.values()) == 34
    state = adapter_state(model)
    assert [tuple(x.shape) for key, x in state.items() if "prompt" in key] == [(5, 16)]
    other = tiny_models.bert().eval()
    inject(other, PromptTuning(num_virtual_tokens=5))
    other.load_state_dict(model.state_dict())
    assert_identical(other(IDS).logits, model(IDS).logits)


def test_ten_steps_learn_what_a_frozen_model_cannot_tell() -> None:
    model = tiny_models.gpt2()
    inject(model, PromptTuning(num_virtual_tokens=4))
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


BAD: dict[str, list[Any]] = {
    "num_virtual_tokens": [0, -1, 1.5, True, None, "3", math.nan],
    "init": ["zeros", None, 3, ["random"]],
    "init_text": [3, ["a"], True],
    "tokenizer": [3, ["a"], b"x"],
    "modules_to_save": [3, "", [""], [None], True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_field_with_a_bad_value_is_named(name: str, value: Any) -> None:
    others = {"init": "text", "init_text": "a", "tokenizer": "b"} if name in ("init_text", "tokenizer") else {}
    with pytest.raises(ConfigError, match=rf"PromptTuning\.{name} must be .*, not "):
        PromptTuning(**{**others, name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"init": "text"},
        {"init": "text", "init_text": "a"},
        {"init": "text", "tokenizer": "b"},
        {"init_text": "a", "tokenizer": "b"},
        {"init": "random", "init_text": "a", "tokenizer": "b"},
        {"init": "random", "init_text": "a"},
        {"tokenizer": "b"},
    ],
)
def test_a_text_and_its_tokenizer_go_with_one_start_alone(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"init=.* with init_text=.* and tokenizer=.*: init='text' needs both"):
        PromptTuning(**fields)


def test_a_model_without_tokens_is_refused() -> None:
    for model in (tiny_models.vit(), nn.Linear(2, 2)):
        with pytest.raises(NotApplicableError, match="PromptTuning puts virtual tokens before a text"):
            _prompt(model)


def test_a_prompt_that_began_as_a_text_is_loaded_without_its_tokenizer(tiny_text_model: Path, tmp_path: Path) -> None:
    tokenizer = shutil.copytree(tiny_text_model, tmp_path / "tokenizer")
    base = tiny_models.bert()
    model = copy.deepcopy(base)
    fields = {"init": "text", "init_text": "film", "tokenizer": str(tokenizer)}
    inject(model, PromptTuning(num_virtual_tokens=3, **fields))
    save_adapter(model, tmp_path / "adapter")
    shutil.rmtree(tokenizer)
    load_adapter(base, tmp_path / "adapter")
    assert_identical(base.eval()(IDS).logits, model.eval()(IDS).logits)
