"""What a call means: its cache under any name, its padding and positions; and that no other file knows the names."""

import ast
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from generating import cache_name, with_cache

import lightning_peft
from lightning_peft import PrefixTuning, PromptTuning, inject
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.calls import LENGTHS, argument_names, bound
from lightning_peft.optional import HF_NEWEST
from lightning_peft.prompting import call as model_call
from lightning_peft.prompting.call import (
    cached_tokens,
    check_one_text,
    find_cache,
    layer_cached_tokens,
    position_argument,
    resumes_recurrence,
    row_padding,
    text_length,
)

pytestmark = pytest.mark.compat

IDS = torch.tensor([[9, 7, 12, 33, 21, 8]])
PACKAGE = Path(lightning_peft.__file__).parent


def _filled(tokens: int = 4) -> Any:
    """A real cache with ``tokens`` tokens in it."""
    model = tiny_models.llama().eval()
    (cache,) = with_cache(model, model(IDS[:, :tokens], use_cache=True)).values()
    return cache


def test_arguments_by_position_and_by_name_are_the_same_call() -> None:
    names = argument_names(tiny_models.llama())
    assert names[:2] == ("input_ids", "attention_mask")
    mask = torch.ones(1, 6)
    assert bound(names, (IDS, mask), {"use_cache": True}) == {
        "input_ids": IDS,
        "attention_mask": mask,
        "use_cache": True,
    }


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past", "cache_params", "what_comes_next"])
def test_a_cache_is_found_under_any_name(name: str) -> None:
    cache = _filled()
    call = {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(1, 6), name: cache}
    assert find_cache(call) is cache
    assert cached_tokens(call, 2) == 4
    assert layer_cached_tokens(call, 1) == 4


def test_a_call_without_a_cache_is_a_first_step() -> None:
    call = {"input_ids": IDS, "attention_mask": torch.ones(1, 6), "past_key_values": None}
    assert find_cache(call) is None
    assert cached_tokens(call, 6) == 0
    assert layer_cached_tokens(call, 0) is None


def test_an_empty_cache_holds_no_token() -> None:
    assert cached_tokens({"input_ids": IDS, "cache": hf.DynamicCache()}, 6) == 0


def test_a_static_cache_is_counted_as_it_is_before_the_layer_adds_to_it() -> None:
    model = tiny_models.llama().eval()
    cache = hf.StaticCache(config=model.config, max_cache_len=12)
    model(IDS[:, :4], **{cache_name(model): cache})
    before = layer_cached_tokens({"cache": cache}, 0)
    model(IDS[:, 4:], **{cache_name(model): cache})
    assert before == 4
    assert layer_cached_tokens({"cache": cache}, 0) == 6


def test_a_decoding_step_whose_cache_is_not_recognised_is_refused() -> None:
    call = {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(1, 6), "kept_elsewhere": object()}
    with pytest.raises(
        NotApplicableError, match=rf"2 new of 6 tokens.*transformers {hf.__version__} .*use_cache=False"
    ):
        cached_tokens(call, 2)


@pytest.mark.parametrize("masked", [True, False])  # generate leaves a mask of ones out since 5.24
@pytest.mark.parametrize("method", [PromptTuning(num_virtual_tokens=3), PrefixTuning(num_virtual_tokens=3)])
def test_no_cache_that_is_not_recognised_is_taken_for_none(method: Any, masked: bool) -> None:
    """As in a release to come: the base finds its cache where no adapter sees it."""
    model = tiny_models.llama().eval()
    inject(model, method)
    kept = with_cache(model, model(IDS[:, :5], use_cache=True))
    stack = model.model if isinstance(method, PrefixTuning) else model
    behind = stack if isinstance(method, PrefixTuning) else vars(stack)["forward"]  # behind what the adapter sees
    setattr(behind, "forward" if behind is stack else "before", partial(type(stack).forward, stack, **kept))
    call: dict[str, Any] = {"attention_mask": torch.ones(1, 6)} if masked else {"position_ids": torch.tensor([[5]])}
    if isinstance(method, PrefixTuning) and not masked:
        pytest.skip("given positions say all that a prefix has to know")
    with pytest.raises(NotApplicableError, match="1 new of 6 tokens"):
        stack(IDS[:, 5:], use_cache=True, **call)


def test_a_text_may_begin_at_any_position() -> None:
    later = torch.arange(4, 10)[None]
    assert cached_tokens({"input_ids": IDS, "position_ids": later}, 6) == 0
    assert cached_tokens({"input_ids": IDS, "position_ids": later, "use_cache": False}, 6) == 0


def test_what_counts_no_tokens_is_no_cache() -> None:
    with pytest.raises(NotApplicableError, match=rf"is a tuple, which does not say.*transformers {hf.__version__}"):
        find_cache({"input_ids": IDS, "past_key_values": ((torch.zeros(1), torch.zeros(1)),)})


def test_a_model_that_keeps_its_cache_to_itself_does_not_read_a_prompt_twice() -> None:
    model = tiny_models.llama().eval()
    inject(model, PromptTuning(num_virtual_tokens=3))
    with pytest.raises(NotApplicableError, match="1 new of 6 tokens"):
        model(IDS[:, 5:], attention_mask=torch.ones(1, 6))


def test_an_attention_that_keeps_its_cache_to_itself_gives_a_prefix_no_wrong_places() -> None:
    """As a release to come might do it: nothing in the call of T5's attention says where the cache is."""
    model = tiny_models.t5().eval()
    inject(model, PrefixTuning(num_virtual_tokens=3))
    attention = model.decoder.block[0].layer[0].SelfAttention
    cache = hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache())
    attention(torch.randn(1, 5, 16), **{cache_name(attention): cache})
    assert cache.get_seq_length() == 5
    forward = partial(type(attention).forward, attention, **{cache_name(attention): cache})
    vars(attention)["forward"].before = forward  # behind what the adapter sees
    with pytest.raises(NotApplicableError, match=r"1 and no cache that is recognised.*1 new of 6 tokens"):
        attention(torch.randn(1, 1, 16))


class _State:
    """A cache of recurrent layers alone, as transformers' Mamba has it."""

    def __init__(self, begun: bool) -> None:
        self.begun = begun

    def get_seq_length(self, layer: int = 0) -> int:
        raise ValueError("only LinearAttention layers")

    def has_previous_state(self) -> bool:
        return self.begun


@pytest.mark.parametrize("name", ["cache", "cache_params", "past_key_values"])
def test_a_recurrent_model_goes_on_from_a_state(name: str) -> None:
    assert resumes_recurrence({name: _State(True)})
    assert not resumes_recurrence({name: _State(False)})
    assert cached_tokens({name: _State(False)}, 6) == 0
    assert not resumes_recurrence({name: _filled()})
    assert not resumes_recurrence({name: None, "state": None})
    assert resumes_recurrence({"state": [torch.zeros(1)]})


def test_padding_is_that_before_each_row() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    assert row_padding({"attention_mask": mask}, 2).tolist() == [[0], [2]]
    assert row_padding({"attention_mask": mask.flip(1)}, 2) is None
    assert row_padding({"attention_mask": torch.ones(2, 3)}, 2) is None
    assert row_padding({}, 2) is None


def test_how_long_the_text_is_said_to_be() -> None:
    assert text_length({"attention_mask": torch.ones(2, 7), "position_ids": IDS}) == 7
    assert text_length({"position_ids": torch.tensor([[3, 4]])}) == 5
    assert text_length({"input_ids": IDS}) is None


def test_several_texts_in_a_row_are_refused_and_padding_is_not() -> None:
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    with pytest.raises(NotApplicableError, match="several texts"):
        check_one_text(packed)
    with pytest.raises(NotApplicableError, match="several texts"):
        check_one_text({**packed, "attention_mask": torch.ones(1, 5)})
    check_one_text({"position_ids": torch.tensor([[1, 1, 0, 1, 2]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])})
    check_one_text({"position_ids": torch.tensor([[2, 3, 4, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])})
    check_one_text({"position_ids": torch.tensor([[[0, 1, 0, 1]]] * 3)})  # an image's rows and columns
    check_one_text({})
    model = tiny_models.llama().eval()
    inject(model, PromptTuning(num_virtual_tokens=3))
    with pytest.raises(NotApplicableError, match="several texts"):
        model(IDS, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)


def test_the_argument_that_positions_are_counted_by() -> None:
    given: dict[str, Any] = {"position_ids": IDS}
    assert position_argument(("input",), {}, "table") == "input"
    assert position_argument(("x", "position_ids"), given, "rotary") == "position_ids"
    for length in ("cache_length", "past_key_values_length"):
        assert position_argument(("input_ids", length, "position_ids"), {}, "table") == length
        assert position_argument(("input_ids", length, "position_ids"), given, "table") == "position_ids"
    with pytest.raises(NotApplicableError, match=r"'table' was called without position_ids.*input_ids, kv_length"):
        position_argument(("input_ids", "kv_length", "position_ids"), {}, "table")


def test_no_other_file_of_core_and_methods_looks_such_an_argument_up_by_name() -> None:
    known = {*model_call._CACHES, *LENGTHS, *model_call._POSITIONS}
    assert "past_key_values" in known
    for path in sorted(PACKAGE.rglob("*.py")):
        beside = any(
            path.is_relative_to(PACKAGE / room) for room in ("data", "training", "cli")
        )  # they speak of batches
        if beside or path in (PACKAGE / "prompting/call.py", PACKAGE / "network/calls.py"):
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & known, f"{path.name} knows {strings & known}"


def test_a_newer_transformers_is_one_warning_and_only_where_its_insides_matter() -> None:
    script = """
import sys, warnings
sys.path[:0] = [{tests!r}]
import tiny_models, torch
from lightning_peft import LoRA, PrefixTuning, PromptTuning, inject, remove
model = tiny_models.llama()
sys.modules["transformers"].__version__ = "99.1.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    inject(model, LoRA(r=2))
    assert not caught, caught[0].message
    model(torch.arange(3, 9)[None])
    remove(model)
    for method in (PromptTuning(num_virtual_tokens=2), PrefixTuning(num_virtual_tokens=2), PromptTuning()):
        inject(model, method)
        remove(model)
print(*(warning.message for warning in caught), sep="\\n")
"""
    tests = str(Path(__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", script.format(tests=tests)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    assert HF_NEWEST in line
    assert "99.1.0" in line


def test_the_newest_release_that_was_run_is_the_one_that_is_locked() -> None:
    lock = (PACKAGE.parent / "lock.txt").read_text().splitlines()
    assert f"transformers=={HF_NEWEST}" in lock
