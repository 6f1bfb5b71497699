"""Packed rows: every row once, whole, and to a model the same as by itself."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf

from lightning_peft.data import InstructionData
from lightning_peft.data.sources.batches import LanguageModelCollator, PackingCollator
from lightning_peft.data.sources.packing import PackedRows, pack, padding_share

CAPACITY = 32


def rows(count: int, seed: int = 0, longest: int = 20) -> list[dict]:
    """Rows of which the last few tokens are learned."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        ids = [chance.randrange(3, tiny_models.VOCABULARY) for _ in range(chance.randint(2, longest))]
        hidden = chance.randrange(len(ids))
        made.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]})
    return made


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_in_one_block_and_no_block_is_too_long(seed):
    lengths = [len(row["input_ids"]) for row in rows(200, seed)]
    blocks = pack(lengths, CAPACITY)
    assert sorted(row for block in blocks for row in block) == list(range(200))
    assert all(sum(lengths[row] for row in block) <= CAPACITY for block in blocks)
    assert blocks == pack(lengths, CAPACITY)
    # Best-fit decreasing needs at most 11/9 of the best number of blocks, and 6/9 more.
    assert len(blocks) <= 11 / 9 * -(-sum(lengths) // CAPACITY) + 2


@pytest.mark.parametrize(
    ("lengths", "blocks"),
    [
        ([], []),
        ([32], [[0]]),
        ([4, 3, 3, 3, 4, 3], [[0, 4], [1, 2], [3, 5]]),  # each where the least room is left
        ([2, 5, 6, 3], [[2, 0], [1, 3]]),
    ],
)
def test_blocks(lengths, blocks):
    assert pack(lengths, 8 if lengths != [32] else 32) == blocks


def test_the_share_of_padding():
    assert padding_share([2, 4, 3, 3], 2) == pytest.approx(2 / 14)
    assert padding_share([5, 1, 1], 2) == pytest.approx(4 / 11)


def test_a_packed_batch():
    made = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, 9]},
        {"input_ids": [4]},
    ]
    batch = PackingCollator(pad_token_id=7)([PackedRows(made, [[0, 1], [2]])[block] for block in (0, 1)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 7, 7, 7, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100] * 5]
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]


def loss_and_gradients(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen2", "qwen3", "gemma3", "mistral"])
def test_packed_rows_have_the_loss_and_the_gradients_of_unpacked_rows(model, attention):
    """In blocks of several rows, two blocks and padding; gemma3 and mistral have layers that see four tokens."""
    still = {"attn_implementation": attention}
    if model == "gpt2":
        still |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    network = getattr(tiny_models, model)(**still).train()
    assert network.config._attn_implementation == attention
    made = rows(12, longest=12)
    blocks = pack([len(row["input_ids"]) for row in made], CAPACITY)
    assert len(blocks) > 2
    assert any(len(block) > 2 for block in blocks)
    packed = PackingCollator(pad_token_id=0)([PackedRows(made, blocks)[block] for block in range(len(blocks))])
    alone = LanguageModelCollator(pad_token_id=0)(made)
    expected, gradients = loss_and_gradients(network, alone)
    found, packed_gradients = loss_and_gradients(network, packed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    # And that says something: without the positions the rows would see each other.
    del packed["position_ids"]
    if model != "gpt2":
        assert abs(network(**packed, use_cache=False).loss - expected) > 1e-3


@pytest.mark.slow
def test_a_small_language_model_reads_packed_rows_as_it_reads_them_alone():
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "examples/assets.py", "--language-model"], check=True, cwd=root)
    model = hf.AutoModelForCausalLM.from_pretrained(root / ".cache" / "smollm2")
    data = InstructionData(
        str(root / ".cache" / "smollm2"), path=str(root / ".cache" / "faq" / "faq-en-alpaca.jsonl"), packing=True
    )
    data.setup("fit")
    made, lengths = data.splits["train"], data.splits["train"]["length"][:]
    few = [made[row] for row in range(6)]
    blocks = PackedRows(few, pack(lengths[:6], 512))
    assert 1 < len(blocks) < 6
    with torch.no_grad():
        packed = model(**PackingCollator(pad_token_id=2)([blocks[i] for i in range(len(blocks))]), use_cache=False).loss
        alone = model(**LanguageModelCollator(pad_token_id=2)(few), use_cache=False).loss
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
