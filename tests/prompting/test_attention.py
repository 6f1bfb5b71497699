"""A prefix in an attention of transformers, against attention written out in plain torch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

from lightning_peft import PrefixTuning, active, inject
from lightning_peft.errors import NotApplicableError
from lightning_peft.prompting.attention import PrefixedAttention, routes_attention

PREFIX, LENGTH = 3, 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()[:, None, None, :]
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()[None, None]


def _prefixed(build: Callable[..., nn.Module], *names: str, **fields: Any) -> nn.Module:
    model = build(**fields).eval()
    for name in names or ("default",):
        inject(model, PrefixTuning(num_virtual_tokens=PREFIX, init_std=1.0, modules_to_save=None), name)
    return model


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _written_out(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], visible: Tensor, bias: Any) -> Any:
    """Output and weights for (batch, length, features), of as many heads as ``bias`` is for, or of two."""
    heads = 2
    keys = torch.cat([prefix[0].expand(len(k), -1, -1), k], 1)
    values = torch.cat([prefix[1].expand(len(v), -1, -1), v], 1)
    scores = _heads(q, heads) @ _heads(keys, heads).transpose(-1, -2) + bias
    everything = torch.ones(*visible.shape[:-1], prefix[0].shape[0]).bool()
    weights = scores.masked_fill(~torch.cat([everything, visible], -1), float("-inf")).softmax(-1)
    return (weights @ _heads(values, heads)).transpose(1, 2).flatten(2), weights


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_bert(implementation: str, mask: Tensor | None) -> None:
    model = _prefixed(tiny_models.bert, attn_implementation=implementation)
    host = model.bert.encoder.layer[1].attention.self
    x = torch.randn(2, LENGTH, tiny_models.WIDTH)
    given = mask if mask is None or implementation == "sdpa" else torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    output, weights = host(x, attention_mask=given)
    q, k, v = host.query(x) / (tiny_models.WIDTH / 2) ** 0.5, host.key(x), host.value(x)
    expected, probabilities = _written_out(q, k, v, host.peft.default.prefix.flat(), MASK | (mask is None), 0)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    if implementation == "eager":  # the caller gets the weights of the text alone
        torch.testing.assert_close(weights, probabilities[..., PREFIX:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("layer", [0, 1])
def test_t5s_relative_positions_go_on_into_the_prefix(layer: int, stack: str, implementation: str) -> None:
    model = _prefixed(tiny_models.t5, attn_implementation=implementation)
    blocks = getattr(model, stack).block
    attention, table = blocks[layer].layer[0].SelfAttention, blocks[0].layer[0].SelfAttention.relative_attention_bias
    x = torch.randn(2, LENGTH, tiny_models.WIDTH)
    # Queries are at 0, 1, ...; keys at -PREFIX, ..., -1, 0, 1, ... So near, every distance has a bucket of its own.
    distance = torch.arange(-PREFIX, LENGTH)[None] - torch.arange(LENGTH)[:, None]
    bucket = distance.abs() + 16 * (distance > 0) if stack == "encoder" else (-distance).clamp(min=0)
    bias = table(bucket).permute(2, 0, 1)
    mask = torch.ones_like(CAUSAL) if stack == "encoder" else CAUSAL
    given = mask if implementation == "sdpa" else torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    # The first layer computes the bias of the text, the others are given it.
    text = None if layer == 0 else bias[None, ..., PREFIX:]
    output = attention(x, mask=given, position_bias=text)[0]
    q, k, v = (getattr(attention, name)(x) for name in "qkv")
    expected, _ = _written_out(q, k, v, attention.peft.default.prefix.flat(), mask, bias)
    torch.testing.assert_close(output, attention.o(expected), rtol=1e-5, atol=1e-5)


def test_grouped_queries_share_the_keys_of_the_prefix() -> None:
    model = _prefixed(tiny_models.llama)
    host = model.model.layers[0].self_attn
    x, positions = torch.randn(2, LENGTH, tiny_models.WIDTH), torch.arange(LENGTH)[None]
    no_turn = (torch.ones(1, LENGTH, 8), torch.zeros(1, LENGTH, 8))
    output, _ = host(x, position_embeddings=no_turn, attention_mask=CAUSAL, position_ids=positions)
    keys, values = (x.repeat(1, 2) for x in host.peft.default.prefix.flat())  # one head of keys for two of queries
    assert keys.shape == (PREFIX, 16)
    q, k, v = host.q_proj(x) / 8**0.5, host.k_proj(x).repeat(1, 1, 2), host.v_proj(x).repeat(1, 1, 2)
    expected, _ = _written_out(q, k, v, (keys, values), CAUSAL, 0)
    torch.testing.assert_close(output, host.o_proj(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_models.bert, tiny_models.t5, tiny_models.llama])
def test_two_prefixes_are_one_in_which_the_later_comes_first(build: Callable[..., nn.Module]) -> None:
    model = _prefixed(build, "a", "b")
    one = build().eval()
    one.load_state_dict({key: x for key, x in model.state_dict().items() if ".peft." not in key})
    inject(one, PrefixTuning(num_virtual_tokens=2 * PREFIX, modules_to_save=None))
    with torch.no_grad():
        for path, host in model.named_modules():
            if hasattr(host, "peft") and isinstance(getattr(host.peft, "a", None), PrefixedAttention):
                for name in ("keys", "values"):
                    both = torch.cat([getattr(host.peft.b.prefix, name), getattr(host.peft.a.prefix, name)])
                    getattr(one.get_submodule(path).peft.default.prefix, name).copy_(both)
    ids = {"input_ids": torch.randint(3, 40, (2, LENGTH)), "attention_mask": MASK[:, 0, 0].long()}
    if model.config.is_encoder_decoder:
        ids["labels"] = torch.randint(3, 40, (2, 4))
    expected = one(**ids).logits
    torch.testing.assert_close(model(**ids).logits, expected, rtol=1e-5, atol=1e-5)
    with active(model, "a"):
        assert not torch.allclose(model(**ids).logits, expected)


@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.mistral, tiny_models.gemma3, tiny_models.qwen3])
def test_kernels_agree_with_and_without_a_mask(build: Callable[..., nn.Module]) -> None:
    model = _prefixed(build)
    ids = torch.randint(3, 40, (2, 7))
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids).logits
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        for given in (None, mask):
            torch.testing.assert_close(
                model(input_ids=ids, attention_mask=given).logits, expected, rtol=1e-5, atol=1e-5
            )


def test_a_model_that_can_be_told_to_be_not_causal_is_so() -> None:
    model = _prefixed(tiny_models.bert)
    ids = torch.randint(3, 40, (1, LENGTH))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 40
    first = [model(input_ids=x, output_hidden_states=True).hidden_states[-1][0, 0] for x in (ids, changed)]
    assert not torch.allclose(*first)  # the first token sees the last one


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa"])
def test_a_kernel_without_a_mask_for_each_key_is_refused_at_injection(name: str) -> None:
    model = tiny_models.llama()
    model.config._attn_implementation = name
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=name.replace("|", r"\|") + ".*attn_implementation='sdpa'"):
        inject(model, PrefixTuning(num_virtual_tokens=PREFIX))
    before.assert_same(model)


def test_a_kernel_without_a_mask_that_was_chosen_later_is_refused_when_it_runs() -> None:
    model = _prefixed(tiny_models.bert)
    for layer in model.bert.encoder.layer:
        layer.attention.self.config = copy.copy(model.config)
        layer.attention.self.config._attn_implementation = "flash_attention_2"
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=r"BertSelfAttention.*flash_attention_2"):
        model(input_ids=torch.ones(1, LENGTH, dtype=torch.long))
    before.assert_same(model)


def test_an_error_inside_the_attention_leaves_its_own_config_behind() -> None:
    model = _prefixed(tiny_models.bert)
    host = model.bert.encoder.layer[0].attention.self
    ids = torch.randint(3, 40, (1, LENGTH))
    expected = model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match=r"size|expand"):
        host(torch.randn(2, LENGTH, tiny_models.WIDTH), attention_mask=torch.ones(2, 1, LENGTH, 2).bool())
    assert host.config is model.config
    assert_identical(model(input_ids=ids).logits, expected)


def test_which_attentions_look_up_their_function() -> None:
    assert routes_attention(tiny_models.bert().bert.encoder.layer[0].attention.self)
    assert routes_attention(tiny_models.t5().encoder.block[0].layer[0].SelfAttention)
    assert not routes_attention(tiny_models.bert().bert.encoder.layer[0].attention)
    assert not routes_attention(tiny_models.deberta().deberta.encoder.layer[0].attention.self)
    assert not routes_attention(nn.Linear(2, 2))


def test_only_relative_positions_need_the_length_of_the_cache() -> None:
    counts = {
        build.__name__: sum(
            isinstance(module, PrefixedAttention) and module.relative.module is not None
            for module in _prefixed(build).modules()
        )
        for build in (tiny_models.t5, tiny_models.bart, tiny_models.gpt2)
    }
    assert counts == {"t5": 4, "bart": 0, "gpt2": 0}  # T5: the attentions to itself of two and two layers
