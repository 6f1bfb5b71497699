"""Positions of a text behind virtual tokens: who counts them, and how many there are."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import PrefixTuning, PromptTuning, PTuning, inject
from lightning_peft.core.method import Method
from lightning_peft.errors import ConfigError
from lightning_peft.network.positions import free_positions, position_modules, positions_above
from lightning_peft.prompting.shift import PositionShift


def _pegasus() -> nn.Module:
    return hf.PegasusForConditionalGeneration(hf.PegasusConfig(**tiny_models._SEQ2SEQ, max_position_embeddings=20))


def _opt() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "vocab_size": 40}
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=20))


def _roberta() -> nn.Module:
    return tiny_models.roberta(pad_token_id=1, bos_token_id=0, max_position_embeddings=22)


def _gptj() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 20, "rotary_dim": 4}
    return hf.GPTJForCausalLM(hf.GPTJConfig(**sizes, bos_token_id=1, eos_token_id=None))


def _m2m() -> nn.Module:
    return hf.M2M100ForConditionalGeneration(hf.M2M100Config(**tiny_models._SEQ2SEQ, max_position_embeddings=20))


COUNTERS = {
    tiny_models.bert: ["bert.embeddings.position_embeddings"],
    tiny_models.distilbert: ["distilbert.embeddings.position_embeddings"],
    tiny_models.gpt2: ["transformer.wpe"],
    tiny_models.llama: ["model.rotary_emb"],
    tiny_models.gemma3: ["model.rotary_emb"],
    tiny_models.clip_text: ["embeddings.position_embedding"],
    tiny_models.bart: ["model.encoder.embed_positions", "model.decoder.embed_positions"],
    tiny_models.whisper: ["model.encoder.embed_positions", "model.decoder.embed_positions"],
    tiny_models.t5: [],
    tiny_models.deberta: ["deberta.embeddings.position_embeddings"],
}


@pytest.mark.parametrize("build", COUNTERS)
def test_who_counts_the_tokens(build: Callable[[], nn.Module]) -> None:
    assert [path for path, _ in position_modules(build())] == COUNTERS[build]


@pytest.mark.parametrize(
    ("build", "block", "expected"),
    [
        (tiny_models.bert, "bert.encoder.layer.1", ["bert.embeddings.position_embeddings"]),
        (tiny_models.gpt2, "transformer.h.0", ["transformer.wpe"]),
        (tiny_models.llama, "model.layers.0", ["model"]),  # whatever it makes of the numbers
        (_gptj, "transformer.h.1", ["transformer"]),
        (_m2m, "model.decoder.layers.0", ["model.decoder.embed_positions"]),  # sines
        (tiny_models.bart, "model.encoder.layers.0", ["model.encoder.embed_positions"]),
        (tiny_models.bart, "model.decoder.layers.0", ["model.decoder.embed_positions"]),
        (tiny_models.whisper, "model.encoder.layers.0", []),  # frames of a recording
        (tiny_models.whisper, "model.decoder.layers.0", ["model.decoder.embed_positions"]),
        (tiny_models.vit, "vit.layers.0", []),  # patches of an image
        (tiny_models.t5, "encoder.block.0", []),
    ],
)
def test_who_counts_for_a_block(build: Callable[[], nn.Module], block: str, expected: list[str]) -> None:
    model = build()
    assert model.get_submodule(block)
    assert positions_above(model, block) == expected


class Seeing(nn.Module):
    """An image's tower beside a language model, as in vision-language models; positions of patches are a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.vision, self.model.language_model = tiny_models.vit(), tiny_models.llama().model
        self.model.vision.tiles = nn.Embedding(4, 16)  # no tokens
        self.head = nn.Linear(16, 40)


def test_a_tower_beside_the_text_moves_no_token_of_it() -> None:
    model = Seeing()
    assert positions_above(model, "model.vision.vit.layers.0") == []
    assert positions_above(model, "model.language_model.layers.1") == ["model.language_model"]


def test_how_many_positions_a_table_has() -> None:
    free = {
        build.__name__: [free_positions(module) for _, module in position_modules(build())]
        for build in (tiny_models.bert, tiny_models.gpt2, _roberta, tiny_models.bart, _opt, tiny_models.llama)
    }
    # RoBERTa's padding takes the entries 0 and 1; BART and OPT never look at their first two.
    assert free == {"bert": [20], "gpt2": [20], "_roberta": [20], "bart": [20, 20], "_opt": [20], "llama": [None]}


class _Counting(nn.Embedding):
    """Like BART's table: the caller says where to begin, or gives the positions."""

    offset = 2

    def forward(self, input_ids: Tensor, cache_length: int = 0, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]) + cache_length
        return super().forward(position_ids + self.offset)


IDS = torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((IDS,), {}, [3, 4, 5, 6]),
        ((IDS, 2), {}, [5, 6, 7, 8]),
        ((IDS, torch.tensor(2)), {}, [5, 6, 7, 8]),  # a static cache counts in a tensor
        ((IDS,), {"cache_length": 1}, [4, 5, 6, 7]),
        ((IDS, 9), {"position_ids": torch.tensor([4, 0])}, [7, 3]),
        ((), {"input_ids": IDS, "position_ids": None, "cache_length": 0}, [3, 4, 5, 6]),
    ],
)
def test_every_way_to_ask_a_table_that_counts_itself(args: Any, kwargs: Any, expected: list[int]) -> None:
    table = _Counting(20, 5)
    args, kwargs = PositionShift("table", table, 3)(args, kwargs)
    torch.testing.assert_close(table(*args, **kwargs), table.weight[torch.tensor(expected) + 2])


@pytest.mark.parametrize("past", [10, torch.tensor(10)])
def test_the_end_of_a_table_that_counts_itself(past: Any) -> None:
    shift = PositionShift("table", _Counting(20, 5), 3)
    shift((IDS, past), {})  # entries 2 + 3 + 10 and three more: the last is 18
    shift((IDS, past + 1), {})
    with pytest.raises(ConfigError, match=r"beside 3 virtual tokens.*entry 21 of the position table 'table'.* 20\."):
        shift((IDS, past + 2), {})


def test_a_plain_table_and_a_rotary_embedding() -> None:
    table = nn.Embedding(20, 5)
    positions = torch.tensor([[0, 1, 4]])
    for args, kwargs in (((positions,), {}), ((), {"input": positions})):
        args, kwargs = PositionShift("table", table, 3)(args, kwargs)
        torch.testing.assert_close(table(*args, **kwargs), table.weight[positions + 3])
    rotary = tiny_models.llama().model.rotary_emb
    x = torch.zeros(1, 3, 16)
    args, kwargs = PositionShift("rotary", rotary, 3)((x,), {"position_ids": positions})
    torch.testing.assert_close(rotary(*args, **kwargs), rotary(x, position_ids=positions + 3))


def test_no_position_is_read_on_another_device() -> None:
    args, kwargs = PositionShift("table", nn.Embedding(5, 2, device="meta"), 3)((IDS.to("meta") + 9,), {})
    assert (args, kwargs["input"].device.type) == ((), "meta")


TABLES: dict[Callable[[], nn.Module], str] = {
    tiny_models.bert: "bert.embeddings.position_embeddings",
    tiny_models.gpt2: "transformer.wpe",
    _roberta: "roberta.embeddings.position_embeddings",
    tiny_models.bart: "model.encoder.embed_positions",
    _pegasus: "model.encoder.embed_positions",
    _opt: "model.decoder.embed_positions",
    _gptj: "transformer.rotary_emb",  # sines, but only so many
}
METHODS = [PrefixTuning, PromptTuning, PTuning]


def _table(build: Callable[[], nn.Module], method: type[Method]) -> str:
    # A prefix of an encoder that a decoder reads moves no positions.
    return TABLES[build].replace("encoder", "decoder") if method is PrefixTuning else TABLES[build]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", TABLES)
def test_a_prompt_that_fills_the_table_is_refused_at_injection(
    build: Callable[[], nn.Module], method: type[Method]
) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(
        ConfigError, match=rf"20 virtual tokens leave no room .*'{_table(build, method)}' has 20 positions"
    ):
        inject(model, method(num_virtual_tokens=20))
    before.assert_same(model)
    inject(model, method(num_virtual_tokens=19))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", TABLES)
def test_a_text_that_ends_behind_the_table_is_refused_when_it_comes(
    build: Callable[[], nn.Module], method: type[Method]
) -> None:
    model = build().eval()
    inject(model, method(num_virtual_tokens=12))
    ids = torch.randint(3, 40, (2, 9))
    calls: list[dict[str, Tensor]] = [{"input_ids": x} for x in (ids[:, :8], ids)]
    if model.config.is_encoder_decoder:
        calls = [{**call, "decoder_input_ids": call["input_ids"]} for call in calls]
    expected = model(**calls[0]).logits
    assert expected.isfinite().all()
    before = Snapshot(model)
    with pytest.raises(ConfigError, match=rf"12 virtual.*'{_table(build, method)}'.*num_virtual_tokens") as error:
        model(**calls[1])
    assert "9 tokens" in str(error.value) or "entry" in str(error.value)
    before.assert_same(model)
    torch.testing.assert_close(model(**calls[0]).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_generating_beyond_the_table_is_refused(method: type[Method]) -> None:
    model = tiny_models.gpt2(eos_token_id=None).eval()
    inject(model, method(num_virtual_tokens=12))
    ids = torch.randint(3, 40, (1, 5))
    assert model.generate(ids, max_new_tokens=4).shape == (1, 9)  # the last token is not read
    for use_cache in (True, False):
        with pytest.raises(ConfigError, match=r"12 virtual.*'transformer\.wpe'"):
            model.generate(ids, max_new_tokens=5, use_cache=use_cache)
