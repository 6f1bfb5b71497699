"""Prefix tuning: where prefixes sit, how they come about, and that every kind of attention reads them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from snapshot import assert_identical
from torch import Tensor, nn

from lightning_peft import LoRA, PrefixTuning, PromptTuning, disabled, inject, merge
from lightning_peft.checkpoints.ckpt import adapter_state
from lightning_peft.methods.prefix_tuning import Prefix, Trunk

PREFIX = 3
Build = Callable[..., nn.Module]
IDS = torch.tensor([[9, 7, 12, 33, 21, 8], [8, 7, 5, 11, 0, 0]])
MASK = (IDS != 0).long()


def _prefixed(build: Build, *, base: nn.Module | None = None, **fields: Any) -> nn.Module:
    model = (build() if base is None else copy.deepcopy(base)).eval()
    fields = {"num_virtual_tokens": PREFIX, "init_std": 1.0, "modules_to_save": None, **fields}
    inject(model, PrefixTuning(**fields))
    return model


def _prefixes(model: nn.Module) -> dict[str, Prefix]:
    return {path.partition(".peft.")[0]: module for path, module in model.named_modules() if isinstance(module, Prefix)}


def _phi3() -> nn.Module:
    """Queries, keys and values in one layer, with fewer keys and values."""
    config = hf.Phi3Config(**{**tiny_models.SIZES, **tiny_models.TOKENS}, num_key_value_heads=1)
    return hf.Phi3ForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "count", "features"),
    [
        (tiny_models.bert, 2, 16),
        (tiny_models.gpt2, 2, 16),
        (tiny_models.llama, 2, 8),  # one head of keys for two of queries
        (tiny_models.qwen3, 2, 12),  # wider heads
        (_phi3, 2, 8),
        (tiny_models.t5, 6, 16),
        (tiny_models.vit, 2, 16),
        (tiny_models.clip_text, 2, 16),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 17, batch_first=True), 3), 3, 12),
    ],
)
def test_every_attention_gets_keys_and_values_of_its_size(build: Build, count: int, features: int) -> None:
    model = _prefixed(build)
    prefixes = _prefixes(model)
    assert len(prefixes) == count
    assert {p.shape for prefix in prefixes.values() for p in prefix.parameters()} == {(PREFIX, features)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == count * 2 * PREFIX * features


@pytest.mark.parametrize(
    ("build", "call"),
    [
        (_phi3, {"input_ids": IDS}),
        (tiny_models.vit, {"pixel_values": torch.rand(2, 3, 8, 8)}),
        (tiny_models.clip_text, {"input_ids": IDS}),
        (tiny_models.whisper, {"input_features": torch.rand(2, 8, 16), "decoder_input_ids": IDS[:, :3]}),
    ],
)
def test_every_prefix_acts_and_learns(build: Build, call: dict[str, Tensor]) -> None:
    model = _prefixed(build)
    output = model(**call)[0]
    output.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with disabled(model):
        assert not torch.allclose(model(**call)[0], output, atol=1e-4)


@pytest.mark.parametrize("build", [tiny_models.bert, tiny_models.gpt2, tiny_models.llama, tiny_models.mistral, _phi3])
def test_a_padded_row_gives_what_it_gives_alone(build: Build) -> None:
    model = _prefixed(build)
    whole = model(IDS, attention_mask=MASK)[0][1]
    alone = model(IDS[1:, :4])[0][0]
    torch.testing.assert_close(alone, whole if alone.dim() == 1 else whole[:4], rtol=1e-4, atol=1e-5)
    if alone.dim() == 2:  # padding before the text, as for generation
        turned, mask = IDS.roll(2, 1), MASK.roll(2, 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = model(turned, attention_mask=mask, position_ids=positions)[0][1]
        torch.testing.assert_close(left[2:], alone, rtol=1e-4, atol=1e-5)


PLACES = {
    "encoder": "encoder.{}.0.SelfAttention",
    "decoder": "decoder.{}.0.SelfAttention",
    "cross": "decoder.{}.1.EncDecAttention",
}


@pytest.mark.parametrize("places", [["encoder"], ["decoder"], ["cross"], ["encoder", "cross"], ("decoder",)])
def test_places_of_an_encoder_decoder_model(places: list[str]) -> None:
    model = _prefixed(tiny_models.t5, places=places)
    expected = {PLACES[place].format(f"block.{i}.layer") for place in places for i in (0, 1)}
    assert set(_prefixes(model)) == expected
    goal = IDS[:, :3]
    states = model.get_encoder()(IDS, attention_mask=MASK).last_hidden_state
    with disabled(model):
        plain = model.get_encoder()(IDS, attention_mask=MASK).last_hidden_state
    assert torch.equal(states, plain) == ("encoder" not in places)
    output = model(encoder_outputs=(plain,), attention_mask=MASK, decoder_input_ids=goal).logits
    with disabled(model):
        expected = model(encoder_outputs=(plain,), attention_mask=MASK, decoder_input_ids=goal).logits
    assert torch.equal(output, expected) == (places == ["encoder"])


def test_places_mean_nothing_where_there_is_one_kind() -> None:
    assert len(_prefixes(_prefixed(tiny_models.gpt2, places=["cross"]))) == 2


@pytest.mark.parametrize("build", [tiny_models.bert, tiny_models.llama, tiny_models.t5])
def test_an_mlp_makes_the_same_prefix_as_the_one_it_computes(build: Build) -> None:
    base = build().eval()
    model = _prefixed(build, base=base, prefix_projection=True, encoder_hidden_size=7)
    assert sum(isinstance(module, Trunk) for module in model.modules()) == 1  # all layers share it
    assert {tuple(p.up.weight.shape)[1] for p in _prefixes(model).values()} == {7}
    flat = _prefixed(build, base=base)
    with torch.no_grad():
        for mine, made in zip(_prefixes(flat).values(), _prefixes(model).values(), strict=True):
            for parameter, value in zip((mine.keys, mine.values), made.flat(), strict=True):
                parameter.copy_(value)
    call = {"input_ids": IDS, "attention_mask": MASK}
    if base.config.is_encoder_decoder:
        call["labels"] = IDS
    found = model(**call).logits
    torch.testing.assert_close(found, flat(**call).logits, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_all_of_the_mlp_is_kept_and_restored_exactly() -> None:
    fields = {"prefix_projection": True, "encoder_hidden_size": 7}
    model = _prefixed(tiny_models.gpt2, **fields)
    state = adapter_state(model)
    assert len(state) == 3 + 2 * 2  # the trunk's embedding, weight and bias; weight and bias of two layers
    other = _prefixed(tiny_models.gpt2, base=None, **fields)
    other.load_state_dict(model.state_dict())
    assert_identical(other(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("std", "expected"), [(0, 0.0), (0.02, 0.02), (1.5, 1.5)])
def test_the_start(std: float, expected: float) -> None:
    prefixes = _prefixes(
        _prefixed(lambda: tiny_models.bert(max_position_embeddings=999), num_virtual_tokens=500, init_std=std)
    )
    values = torch.cat([p.flatten() for prefix in prefixes.values() for p in prefix.parameters()])
    assert values.mean().abs() < 0.03 * max(std, 1e-9) + 1e-9
    assert values.std().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.llama, tiny_models.bert, tiny_models.t5])
@pytest.mark.parametrize("fields", [{}, {"prefix_projection": True}], ids=["flat", "mlp"])
def test_transformers_checkpointing_gives_the_same_gradients(build: Build, fields: dict[str, Any]) -> None:
    model = _prefixed(build, **fields).train()
    labels = torch.tensor([0, 1]) if build is tiny_models.bert else IDS
    gradients = []
    for checkpoint in (None, {"use_reentrant": False}):
        if checkpoint:
            # renamed within transformers 5
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(checkpoint)
        model.zero_grad()
        torch.manual_seed(3)  # for dropout
        model(input_ids=IDS, attention_mask=MASK, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


def test_beside_lora_it_reads_the_keys_of_both() -> None:
    model = tiny_models.llama().eval()
    inject(model, LoRA(target_modules="all-linear"), "lora")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    merged = copy.deepcopy(model)
    inject(model, PrefixTuning(num_virtual_tokens=PREFIX))
    merge(merged, "lora")
    inject(merged, PrefixTuning(num_virtual_tokens=PREFIX))
    with torch.no_grad():
        for mine, other in zip(_prefixes(merged).values(), _prefixes(model).values(), strict=True):
            mine.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, rtol=1e-5, atol=1e-5)


def test_beside_a_prompt_the_text_moves_on_by_both() -> None:
    base = tiny_models.gpt2().eval()
    model = _prefixed(tiny_models.gpt2, base=base)
    embedded = base.transformer.wte(IDS)
    inject(model, PromptTuning(num_virtual_tokens=4), "prompt")
    prompt = model.peft.prompt.prompt.embedding.expand(2, -1, -1)
    found = model(IDS).logits
    alone = _prefixed(tiny_models.gpt2, base=base)
    alone.load_state_dict({key: x for key, x in model.state_dict().items() if ".prompt" not in f".{key}"})
    expected = alone(inputs_embeds=torch.cat([prompt, embedded], 1)).logits[:, 4:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
