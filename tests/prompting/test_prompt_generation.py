"""Generation behind virtual tokens, and behind a prefix: each row, and each way to go on, gives the same."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from generating import with_cache
from torch import Tensor, nn

from lightning_peft import PrefixTuning, PromptTuning, PTuning, inject
from lightning_peft.core.method import Method
from lightning_peft.errors import NotApplicableError

pytestmark = pytest.mark.compat

METHODS: dict[str, Method] = {
    "prompt": PromptTuning(num_virtual_tokens=4),
    "p-tuning": PTuning(num_virtual_tokens=4, encoder_hidden_size=7),
    "prefix": PrefixTuning(num_virtual_tokens=4, init_std=1.0),
}
CAUSAL = (tiny_models.gpt2, tiny_models.llama, tiny_models.qwen3)
SLIDING = (tiny_models.gemma3, tiny_models.mistral)
SEQ2SEQ = (tiny_models.t5, tiny_models.bart)
IDS = torch.tensor([[9, 7, 12, 33, 21, 8], [0, 0, 8, 7, 5, 11]])
MASK = (IDS != 0).long()


def _model(build: Callable[..., nn.Module], method: str) -> Any:
    model = build().eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    inject(model, METHODS[method])
    return model


def _scores(model: Any, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """The logits of five greedy tokens, (batch, 5, vocabulary)."""
    settings = {"max_new_tokens": 5, "do_sample": False, **settings}
    return torch.stack(
        model.generate(ids, attention_mask=mask, **settings, return_dict_in_generate=True, output_logits=True).logits,
        1,
    )


def _assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [*CAUSAL, *SEQ2SEQ])
def test_a_padded_row_generates_what_it_generates_alone(build: Callable[..., nn.Module], method: str) -> None:
    model = _model(build, method)
    # An encoder is padded behind the text, what goes on is padded before it.
    ids, mask = (IDS.flip(1), MASK.flip(1)) if build in SEQ2SEQ else (IDS, MASK)
    together = _scores(model, ids, mask)
    for row in (0, 1):
        _assert_close(_scores(model, ids[row : row + 1, mask[row].bool()]), together[row : row + 1])
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", SLIDING)
def test_padding_does_not_use_up_a_window(build: Callable[..., nn.Module], method: str) -> None:
    model = _model(build, method)
    _assert_close(_scores(model, IDS[1:, 2:]), _scores(model, IDS, MASK)[1:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [*CAUSAL, *SLIDING, *SEQ2SEQ])
def test_with_and_without_a_cache(build: Callable[..., nn.Module], method: str) -> None:
    model = _model(build, method)
    _assert_close(_scores(model, IDS, MASK, use_cache=False), _scores(model, IDS, MASK))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [*CAUSAL, *SLIDING, *SEQ2SEQ])
def test_beams(build: Callable[..., nn.Module], method: str) -> None:
    model = _model(build, method)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    with_cache = model.generate(IDS, attention_mask=MASK, **settings)
    assert torch.equal(with_cache, model.generate(IDS, attention_mask=MASK, **settings, use_cache=False))
    assert with_cache.shape[0] == 4


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.qwen3])
def test_padding_before_a_row_does_not_move_it_away_from_a_prefix(build: Callable[..., nn.Module]) -> None:
    """Called without positions, the model counts the padding; text and prefix must stay side by side all the same."""
    model = _model(build, "prefix")
    alone = model(IDS[1:, 2:]).logits
    first = model(IDS[:, :5], attention_mask=MASK[:, :5], use_cache=True)
    _assert_close(first.logits[1, 2:], alone[0, :3])
    _assert_close(model(IDS[:, 5:], attention_mask=MASK, **with_cache(model, first)).logits[1], alone[0, 3:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", CAUSAL)  # in a sliding window, such padding uses up the base's own places
def test_rows_padded_at_their_end_go_on_from_a_cache_as_they_do_alone(
    build: Callable[..., nn.Module], method: str
) -> None:
    """As scoring does it: texts of different lengths in one batch, then one more token for each."""
    model = _model(build, method)
    ids, mask = IDS.flip(1), MASK.flip(1)
    first = model(ids, attention_mask=mask, use_cache=True)
    new, lengths = torch.tensor([[5], [6]]), mask.sum(-1)
    whole = torch.cat([mask, torch.ones_like(new)], 1)
    given = {"attention_mask": whole, "position_ids": lengths[:, None]}
    together = model(new, **given, **with_cache(model, first)).logits
    for row, length in enumerate(lengths.tolist()):
        alone = model(torch.cat([ids[row : row + 1, :length], new[row : row + 1]], 1)).logits
        _assert_close(first.logits[row, :length], alone[0, :length])
        _assert_close(together[row, 0], alone[0, length])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [*CAUSAL, *SLIDING])
def test_from_embedded_tokens(build: Callable[..., nn.Module], method: str) -> None:
    model = _model(build, method)
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(IDS, attention_mask=MASK, **settings)[:, 6:]
    embedded = model.get_input_embeddings()(IDS)
    assert torch.equal(model.generate(inputs_embeds=embedded, attention_mask=MASK, **settings), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [*CAUSAL, *SLIDING])
def test_a_call_that_goes_on_from_a_cache(build: Callable[..., nn.Module], method: str) -> None:
    model = _model(build, method)
    expected = model(IDS[:1]).logits[:, 4:]
    for mask in (None, torch.ones(1, 6)):
        cache = with_cache(model, model(IDS[:1, :4], use_cache=True))
        _assert_close(model(IDS[:1, 4:], **cache, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.llama])
def test_prompt_lookup_takes_a_cache_back(build: Callable[..., nn.Module], method: str) -> None:
    model = _model(build, method)
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, prompt_lookup_num_tokens=2), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [*CAUSAL, *SLIDING])
def test_a_conversation(build: Callable[..., nn.Module], method: str) -> None:
    """generate leaves out what a cache holds, and counts virtual tokens among it."""
    model = _model(build, method)
    settings = {"max_new_tokens": 3, "do_sample": False}
    first = model.generate(IDS[:1], **settings, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, IDS[:1]], 1)[:, :13]
    mask = torch.ones_like(whole)
    expected = model.generate(whole, attention_mask=mask, **settings)[:, 13:]
    if method != "prefix":
        with pytest.raises(NotApplicableError, match=r"12 tokens, 4 of them virtual.* the new tokens alone"):
            model.generate(whole, attention_mask=mask, **with_cache(model, first), **settings)
    new = whole[:, 8:]  # the last token that was generated has not been read
    found = model.generate(new, attention_mask=mask, **with_cache(model, first), **settings)
    assert torch.equal(found[:, new.shape[1] :], expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [*CAUSAL, *SLIDING, *SEQ2SEQ])
def test_a_static_cache_gives_the_same_or_is_refused(build: Callable[..., nn.Module], method: str) -> None:
    model = _model(build, method)
    if method == "prefix" or build in SEQ2SEQ:
        _assert_close(_scores(model, IDS, MASK, cache_implementation="static"), _scores(model, IDS, MASK))
        return
    expected = _scores(model, IDS, MASK)
    with pytest.raises(NotApplicableError, match="leave cache_implementation at its default"):
        _scores(model, IDS, MASK, cache_implementation="static")
    _assert_close(_scores(model, IDS, MASK), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.llama])
def test_what_generate_hands_out_has_the_lengths_of_the_text(build: Callable[..., nn.Module], method: str) -> None:
    model = _model(build, method)
    model.set_attn_implementation("eager")
    output = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=3, return_dict_in_generate=True, output_attentions=True,
        output_hidden_states=True,
    )  # fmt: skip
    assert [x[0].shape[1:] for x in output.hidden_states] == [(6, 16), (1, 16), (1, 16)]
    assert [x[0].shape[1:] for x in output.attentions] == [(2, 6, 6), (2, 1, 7), (2, 1, 8)]


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=4, initializer_range=0.5)
    ),
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40, attention_hidden_size=16)
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_model_reads_the_virtual_tokens_once(name: str) -> None:
    model = _model(RECURRENT[name], "prompt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # else their logits hardly depend on the text
    _assert_close(_scores(model, IDS[:1]), _scores(model, IDS[:1], use_cache=False))
