"""Prefix and prompt tuning in every family that transformers has, against what the base itself makes of tokens.

A prefix that holds the keys and values which the base makes of P tokens has to give what the base gives behind these
tokens; so has a prompt that holds their embeddings.
"""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from conformance.families import EXACT, FAMILIES, NotTinyError, Tiny, build, error, make
from generating import cache_name, with_cache
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ2SEQ
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextForCausalLM

from lightning_peft import PrefixTuning, PromptTuning
from lightning_peft.errors import NotApplicableError
from lightning_peft.methods.prefix_tuning import Prefix
from lightning_peft.methods.prompt_tuning import Prompt

# Some of these models read images as well, or another model's states, which they are not given here.
pytestmark = pytest.mark.filterwarnings("ignore:Adapted layers that have not run:UserWarning")

_REMEMBERED = "Recurrent layers remember the tokens, and the prefix stands before the attentions alone."
_LOOPED = "The layers run several times, with other keys each time, and a prefix is the same each time."
_LOOKED_UP = "Every layer looks the tokens up by their ids once more, and virtual tokens have none."
EXCEPTIONS: dict[str, dict[str, str]] = {
    "prefix": {
        "diffllama": "The heads of its values are rearranged behind the cache, and the prefix stands behind that.",
        "doge": "The attention adds a bias that it makes of each key's value; the prefix's columns get zero.",
        "dory": _LOOPED,
        "hrm_text": _LOOPED,
        "inkling_text": "The attention adds a bias by distance, of which the prefix gets zero; convolutions remember.",
        "lara_mini": _REMEMBERED,
        "llama4_text-scaled": "An attention without rotary positions counts the tokens by the length of its cache.",
        "qwen3_5": _REMEMBERED,
        "qwen3_5_moe": _REMEMBERED,
        "qwen3_5_moe_text": _REMEMBERED,
        "qwen3_5_text": _REMEMBERED,
        "qwen3_next": _REMEMBERED,
        "qwen4_exp_text": "Recurrent layers remember the tokens, and so does the index of an attention.",
        "recurrent_gemma": _REMEMBERED,
    },
    "prompt": {"gemma3n_text": _LOOKED_UP, "gemma4": _LOOKED_UP, "gemma4_text": _LOOKED_UP},
}
"""Families in which an oracle does not hold, and why. A test fails where one holds by now."""
HYBRIDS = [family for family, reason in EXCEPTIONS["prefix"].items() if reason is _REMEMBERED and family in FAMILIES]
SCALED = [family for family in ("beam", "ministral3-scaled") if family in FAMILIES]
OWN_ORDER = ("cpmant", "xlnet")  # one looks up tokens of its own before the text, one has the rows behind each other
TOLD_OF_TOKENS = ("xlm", "xlnet")  # generate tells them a language of each token, or which others it sees
COMPAT = ("gpt2", "llama", "gptj", "qwen3", "gemma3_text", "mistral", "opt", "bert", "mamba")

P, TEXT, PADDING = 5, 7, 2  # tokens that a prefix or a prompt stands for, those behind them, and those of padding
FAR = 8188 + torch.arange(P + TEXT)[None]  # across 8192, behind which some models scale queries by their positions
PREFIX, PROMPT = PrefixTuning(num_virtual_tokens=P, init_std=1.0), PromptTuning(num_virtual_tokens=P)


def _each(exceptions: Mapping[str, str], without: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Run a test with the base of each family; where it is an exception, the test has to fail."""
    params = []
    for family in FAMILIES:
        marks = [pytest.mark.compat if family in COMPAT else pytest.mark.soak]
        if family in exceptions:
            marks.append(pytest.mark.xfail(strict=True, raises=AssertionError, reason=exceptions[family]))
        if family not in without:
            params.append(pytest.param(family, marks=marks))
    return pytest.mark.parametrize("base", params, indirect=True)


@pytest.fixture(scope="module")  # pytest then runs the tests of one family after each other, and it is built once
def base(request: pytest.FixtureRequest) -> Tiny:
    return _or_skip(lambda: build(request.param))


@pytest.fixture(scope="module")
def generating(base: Tiny) -> Tiny:
    """The base, if it generates the same with and without a cache itself."""
    try:
        off = _generation_error(base)
    except Exception as reason:
        pytest.skip(f"the base itself does not generate: {type(reason).__name__}: {reason}")
    if not off < EXACT:
        pytest.skip("the base itself does not generate the same with a cache")
    return base


@pytest.fixture
def prefixed(base: Tiny) -> Tiny:
    return _or_skip(lambda: base.adapted(PREFIX))


@_each(EXCEPTIONS["prefix"])
def test_a_prefix_stands_for_the_tokens_before_the_text(base: Tiny, prefixed: Tiny) -> None:
    assert _off(_prefix_errors(base, prefixed)) == {}


@_each({})
def test_generation_behind_a_prefix_is_the_same_with_a_cache(prefixed: Tiny, generating: Tiny) -> None:
    assert _generation_error(prefixed) < EXACT


@pytest.mark.soak
@pytest.mark.parametrize("base", HYBRIDS, indirect=True)
def test_a_prefix_beside_recurrent_layers_stands_for_a_cache_of_its_keys(base: Tiny, prefixed: Tiny) -> None:
    text, pairs = _tokens(base)[:, P:], _fill(prefixed, base.cached(_tokens(base)[:, :P]))
    cache = hf.DynamicCache(config=base.model.config.get_text_config(decoder=True))
    for layer, pair in pairs.items():
        cache.update(*pair, layer)
    call = {cache_name(base.model): cache, "attention_mask": torch.ones(1, P + TEXT), "use_cache": False}
    expected = base(text, position_ids=torch.arange(P, P + TEXT)[None], **call).logits
    assert error(prefixed(text).logits, expected) < EXACT


@_each(EXCEPTIONS["prompt"], without=OWN_ORDER)
def test_a_prompt_stands_for_the_tokens_before_the_text(base: Tiny) -> None:
    prompted, ids = base.adapted(PROMPT), _tokens(base)
    prompt = next(module for module in prompted.model.modules() if isinstance(module, Prompt))
    with torch.no_grad():
        prompt.embedding.copy_(base.model.get_input_embeddings()(ids[:, :P])[0])
    assert _off(_errors(base, prompted)) == {}


@_each({}, without=[*OWN_ORDER, *TOLD_OF_TOKENS])
def test_generation_behind_a_prompt_is_the_same_with_a_cache(generating: Tiny) -> None:
    assert _generation_error(generating.adapted(PROMPT)) < EXACT


@pytest.mark.soak
@pytest.mark.parametrize("base", OWN_ORDER, indirect=True)
def test_a_model_that_does_not_look_up_the_text_in_its_place_refuses_a_prompt(base: Tiny) -> None:
    prompted = base.adapted(PROMPT)
    with pytest.raises(NotApplicableError, match="no place before the text"):
        prompted(_tokens(base))


@pytest.mark.soak
@pytest.mark.parametrize("base", TOLD_OF_TOKENS, indirect=True)
def test_generation_that_says_something_of_each_token_refuses_a_prompt(base: Tiny) -> None:
    with pytest.raises(NotApplicableError, match="says something of each of its"):
        base.adapted(PROMPT).model.generate(_tokens(base), max_new_tokens=2)


@pytest.mark.soak
@pytest.mark.parametrize("base", SCALED, indirect=True)
def test_far_positions_show_in_a_model_that_scales_queries_by_them(base: Tiny) -> None:
    ids = _tokens(base)
    assert error(base(ids, position_ids=FAR).logits, base(ids).logits) > 100 * EXACT


_SOURCE = {"input_ids": torch.tensor([[9, 41, 7, 33, 12, 18]])}
DECODERS: dict[str, Callable[[str], Tiny]] = {
    **dict.fromkeys(SEQ2SEQ, lambda name: make(hf.AutoModelForSeq2SeqLM.from_config, name, source=_SOURCE)),
    "whisper": lambda name: make(
        hf.WhisperForConditionalGeneration._from_config, name, source={"input_features": torch.ones(1, 80, 128)}
    ),
    "speech_to_text": lambda name: make(
        hf.Speech2TextForConditionalGeneration._from_config, name, source={"input_features": torch.ones(1, 40, 80)}
    ),
    "musicgen_decoder": lambda name: make(hf.MusicgenForCausalLM._from_config, name, rows=2),
    "musicgen_melody_decoder": lambda name: make(hf.MusicgenMelodyForCausalLM._from_config, name, rows=2),
    "kosmos_2_text_model": lambda name: make(Kosmos2TextForCausalLM._from_config, name),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_of_a_decoder_stands_for_the_tokens_before_the_text(name: str) -> None:
    base = _or_skip(lambda: DECODERS[name](name))
    # T5Gemma 2 attends to both texts at once, so that places tells no attention of its encoder from its decoder's.
    exclude = ["encoder"] if name == "t5gemma2" else None
    method = PrefixTuning(num_virtual_tokens=P, init_std=1.0, places=["decoder"], exclude_modules=exclude)
    prefixed = _or_skip(lambda: base.adapted(method))
    assert _off(_prefix_errors(base, prefixed)) == {}
    assert _step_error(prefixed) < EXACT


def _or_skip(make: Callable[[], Tiny]) -> Tiny:
    try:
        return make()
    except (NotTinyError, NotApplicableError) as reason:
        pytest.skip(str(reason))


def _off(errors: dict[str, float]) -> dict[str, float]:
    return {way: error for way, error in errors.items() if not error < EXACT}


def _tokens(tiny: Tiny) -> Tensor:
    """Those that a prefix or a prompt stands for, and the text: (rows, P + TEXT)."""
    return tiny.tokens(P + TEXT)


def _prefix_errors(base: Tiny, prefixed: Tiny) -> dict[str, float]:
    """How far off a prefix of tokens' keys and values is from these tokens, by the way of calling the model."""
    ids = _tokens(base)
    _fill(prefixed, base.cached(ids[:, :P]))
    found = _errors(base, prefixed)
    if base.takes_positions():
        try:
            expected = base(ids, position_ids=FAR).logits[:, P:]
        except (IndexError, RuntimeError):  # a table ends before
            return found
        _fill(prefixed, base.cached(ids[:, :P], position_ids=FAR[:, :P]))
        found["far"] = error(prefixed(ids[:, P:], position_ids=FAR[:, :TEXT]).logits, expected)
    return found


def _fill(prefixed: Tiny, kept: Sequence[tuple[Tensor, Tensor] | None]) -> dict[int, tuple[Tensor, Tensor]]:
    """Copy what layers have cached into the prefixes that are read one after the other; it, by the layer's index."""
    read: list[Prefix] = []
    prefixes = [module for module in prefixed.model.modules() if isinstance(module, Prefix)]
    hooks = [prefix.register_forward_pre_hook(lambda prefix, _: read.append(prefix)) for prefix in prefixes]
    prefixed(_tokens(prefixed)[:, P:])
    for hook in hooks:
        hook.remove()
    pairs = {layer: pair for layer, pair in enumerate(kept) if pair is not None}
    assert len(read) == len(pairs), "not every layer of the cache has a prefix"
    for prefix, pair in zip(read, pairs.values(), strict=True):
        for parameter, x in zip((prefix.keys, prefix.values), pair, strict=True):
            parameter.data.copy_(x[:, :, :P].transpose(1, 2).flatten(2)[0])
    return pairs


def _errors(base: Tiny, adapted: Tiny) -> dict[str, float]:
    """How far off the text's logits are as it is, with a mask of ones, and behind padding if the base allows that."""
    ids = _tokens(base)
    text, expected = ids[:, P:], base(ids).logits[..., P:, :]
    found = {"plain": error(adapted(text).logits, expected)}
    if base.source:  # the mask is the encoder's
        return found
    mask = torch.ones(1, TEXT, dtype=torch.long)
    found["mask of ones"] = error(adapted(text, attention_mask=mask).logits, expected)
    padded, call = F.pad(text, (PADDING, 0)), {"attention_mask": F.pad(mask, (PADDING, 0))}
    numbers = {"position_ids": torch.arange(-PADDING, TEXT)[None].clamp(min=0)} if base.takes_positions() else {}
    for way in (call | numbers, call):  # some count from behind the padding by themselves, and some in no way
        if error(base(padded, **way).logits[..., PADDING:, :], base(text).logits) < EXACT:
            found["padded"] = error(adapted(padded, **way).logits[..., PADDING:, :], expected)
            break
    return found


def _generation_error(tiny: Tiny) -> float:
    """How far the logits of four greedy steps with a cache are from those without one."""
    ids = tiny.tokens(TEXT)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings["attention_mask"] = torch.ones_like(ids)
    return error(*(torch.stack(tiny.model.generate(ids, use_cache=x, **settings).logits) for x in (True, False)))


def _step_error(tiny: Tiny) -> float:
    """How far the logits of a text that is read token by token, with a cache, are from those of the whole."""
    ids, steps, past = tiny.tokens(TEXT), [], {}
    for token in ids.split(1, -1):
        output = tiny(token, **past)
        steps.append(output.logits)
        past = with_cache(tiny.model, output)
    return error(torch.cat(steps, -2), tiny(ids, use_cache=False).logits)
