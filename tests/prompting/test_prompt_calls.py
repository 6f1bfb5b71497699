"""Virtual tokens before a text: every way to call a model, and what is refused."""

from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from prompting.prompted import TOKENS, VIRTUAL, Batch, Build, prompted, text
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

from lightning_peft import LoRA, PromptTuning, PTuning, active, disabled, inject, remove
from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.prompting.prompts import PromptedCall, PromptEmbedding

IDS, MASK = text(hf.BertModel).values()


@pytest.mark.parametrize("build", [tiny_models.bert, tiny_models.distilbert, tiny_models.gpt2, tiny_models.llama])
def test_what_is_left_out_means_the_same_as_what_models_take_for_it(build: Build) -> None:
    model, _ = prompted(build)
    full = torch.ones_like(IDS)
    positions = torch.arange(6)[None]
    expected = model(IDS).logits
    calls: list[Batch] = [
        {"input_ids": IDS, "attention_mask": full},
        {"input_ids": IDS, "attention_mask": full.bool()},
        {"input_ids": IDS, "attention_mask": full.float()},
        {"attention_mask": full, "input_ids": IDS},
        {"input_ids": IDS, "position_ids": positions.expand(2, -1)},
        {"input_ids": IDS, "position_ids": positions},
    ]
    if build is tiny_models.bert:  # GPT-2 looks types up among its words
        calls.append({"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)})
    for call in calls:
        torch.testing.assert_close(model(**call).logits, expected, rtol=1e-5, atol=1e-5)
    by_position = (IDS, None, full) if build is tiny_models.gpt2 else (IDS, full)
    torch.testing.assert_close(model(*by_position).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=None).logits, expected, rtol=1e-5, atol=1e-5)


def test_by_position() -> None:
    model, _ = prompted(tiny_models.bert, hf.BertForTokenClassification)
    types, positions = (torch.arange(6) > 2).long().expand(2, -1), torch.arange(6).flip(0).expand(2, -1)
    by_name = model(
        input_ids=IDS, attention_mask=MASK, token_type_ids=types, position_ids=positions, labels=TOKENS["labels"]
    )
    by_position = model(IDS, MASK, types, positions, None, TOKENS["labels"])
    assert_identical(by_position.logits, by_name.logits)
    assert_identical(by_position.loss, by_name.loss)
    assert not torch.allclose(model(IDS, MASK).logits, by_name.logits)  # types and positions are those that were sent


@pytest.mark.parametrize("build", [tiny_models.bert, tiny_models.gpt2, tiny_models.gemma3, tiny_models.t5])
def test_embedded_tokens_in_place_of_ids(build: Build) -> None:
    model, base = prompted(build)
    goal = {"decoder_input_ids": IDS[:, :3]} if base.config.is_encoder_decoder else {}
    embedded = base.get_input_embeddings()(IDS).detach().requires_grad_()
    expected = model(input_ids=IDS, attention_mask=MASK, **goal).logits
    found = model(inputs_embeds=embedded, attention_mask=MASK, **goal).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert embedded.grad.shape == embedded.shape
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_rows_of_a_batch_may_begin_with_padding() -> None:
    model, _ = prompted(tiny_models.gpt2)
    ids = torch.tensor([[9, 7, 12, 33], [0, 0, 8, 7]])
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(together[1, 2:], model(ids[1:, 2:]).logits[0], rtol=1e-5, atol=1e-5)


def test_the_first_of_two_prompts_stands_next_to_the_text() -> None:
    model, base = prompted(tiny_models.gpt2, None, "a", "b")
    a, b = (getattr(model.peft, name).prompt.embedding.expand(2, -1, -1) for name in "ab")
    embedded = base.transformer.wte(IDS)
    for names, vectors in {("a", "b"): [b, a], ("b", "a"): [a, b], ("b",): [b]}.items():
        with active(model, *names):
            expected = base(inputs_embeds=torch.cat([*vectors, embedded], 1)).logits[:, -6:]
            for call in ({"input_ids": IDS}, {"inputs_embeds": embedded}):
                torch.testing.assert_close(model(**call).logits, expected, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(model(**call, return_dict=False)[0], expected, rtol=1e-5, atol=1e-5)
    with disabled(model):
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits, rtol=1e-5, atol=1e-6)
    remove(model, "a")
    expected = base(inputs_embeds=torch.cat([b, embedded], 1)).logits[:, -6:]
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "order",
    [
        ["prompt", "lora"],
        ["lora", "prompt"],
    ],
)
def test_an_adapter_of_the_embedding_leaves_the_vectors_alone(order: list[str]) -> None:
    model = tiny_models.gpt2().eval()
    methods = {"prompt": PromptTuning(num_virtual_tokens=VIRTUAL), "lora": LoRA(r=2, target_modules=["wte"])}
    for name in order:
        inject(model, methods[name], name)
    nn.init.normal_(model.transformer.wte.peft.lora.lora_A)
    embedded = model.transformer.wte(IDS)
    torch.testing.assert_close(model(IDS).logits, model(inputs_embeds=embedded).logits, rtol=1e-5, atol=1e-5)


def test_a_config_that_asks_for_tuples() -> None:
    model, base = prompted(tiny_models.bert, hf.BertForQuestionAnswering)
    model.config.return_dict = base.config.return_dict = False
    found = model(IDS, MASK)
    assert type(found) is tuple
    assert [x.shape for x in found] == [x.shape for x in base(IDS, MASK)]
    assert isinstance(model(IDS, MASK, return_dict=True), dict)


@pytest.mark.parametrize("kept", [1, 3, 9, torch.tensor([0, 2]), torch.tensor([-1])])
def test_logits_of_some_tokens_alone(kept: Any) -> None:
    model, _ = prompted(tiny_models.llama)
    everything = model(IDS).logits
    expected = everything[:, kept] if isinstance(kept, Tensor) else everything[:, -kept:]
    torch.testing.assert_close(model(IDS, logits_to_keep=kept).logits, expected)


def test_places_that_are_counted_in_tokens_of_the_text() -> None:
    model, _ = prompted(tiny_models.gpt2, hf.GPT2DoubleHeadsModel)
    ids = IDS[None]
    last = model(input_ids=ids, mc_token_ids=torch.tensor([[5, 5]])).mc_logits
    torch.testing.assert_close(model(input_ids=ids).mc_logits, last)
    assert not torch.allclose(model(input_ids=ids, mc_token_ids=torch.tensor([[4, 5]])).mc_logits, last)


def test_what_a_decoder_sees_of_the_encoder() -> None:
    model, _ = prompted(tiny_models.t5, attn_implementation="eager")
    goal = IDS[:, :3]
    expected = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=goal, output_attentions=True)
    encoded = model.get_encoder()(IDS, attention_mask=MASK)
    assert encoded.last_hidden_state.shape == (2, VIRTUAL + 6, 16)  # as a decoder needs it
    found = model(encoder_outputs=encoded, attention_mask=MASK, decoder_input_ids=goal)
    assert_identical(found.logits, expected.logits)
    assert expected.encoder_last_hidden_state.shape == (2, 6, 16)
    seen = torch.stack(expected.cross_attentions).sum(-1)
    assert (seen < 0.999).all()  # the rest goes to the virtual tokens
    with pytest.raises(ConfigError, match=r"both of 6 tokens.*4 virtual.*get_encoder"):
        model(encoder_outputs=(expected.encoder_last_hidden_state,), attention_mask=MASK, decoder_input_ids=goal)


@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 1, 6, 6)])
def test_a_mask_that_is_not_one_of_tokens_is_refused(shape: tuple[int, ...]) -> None:
    model, _ = prompted(tiny_models.bert)
    expected = model(IDS).logits
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=rf"\(batch, tokens\).*\({', '.join(map(str, shape))}\)"):
        model(input_ids=IDS, attention_mask=torch.ones(shape))
    before.assert_same(model)
    embedding = model.get_input_embeddings()
    assert_identical(embedding(IDS), nn.functional.embedding(IDS, embedding.weight))  # nothing is left to be put in
    assert_identical(model(IDS).logits, expected)


def test_a_failed_call_leaves_nothing_for_the_next_one() -> None:
    model, _ = prompted(tiny_models.bert)
    expected = model(IDS, MASK).logits
    with pytest.raises(ValueError, match="batch_size"):
        model(IDS, MASK, labels=torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(input_ids=IDS, inputs_embeds=torch.randn(2, 6, 16), return_dict=False)
    assert_identical(model(IDS, MASK).logits, expected)
    with disabled(model):
        assert model(IDS, MASK, output_hidden_states=True).hidden_states[0].shape == (2, 6, 16)


@pytest.mark.parametrize("method", [PromptTuning, PTuning])
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny_models.vit, "ViTForImageClassification embeds no token ids"),
        (tiny_models.whisper, "WhisperForConditionalGeneration embeds no token ids"),
        (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), "Sequential holds no transformers model"),
    ],
)
def test_a_model_that_reads_no_tokens_is_refused(build: Build, reason: str, method: type) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=f"{method.__name__} .*{reason}.*Use PrefixTuning"):
        inject(model, method(num_virtual_tokens=3))
    before.assert_same(model)


def test_a_model_that_looks_up_its_tokens_in_another_order_is_refused_when_it_runs() -> None:
    config = hf.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=24, vocab_size=40)
    model, _ = prompted(lambda: hf.XLNetForSequenceClassification(config))
    with pytest.raises(NotApplicableError, match=r"\(10, 2\), which is not 2 rows of 10 tokens"):
        model(input_ids=IDS)


@pytest.mark.parametrize(
    ("name", "value"), [("langs", torch.zeros(2, 6, dtype=torch.long)), ("perm_mask", torch.zeros(2, 6, 6))]
)
def test_an_argument_about_each_token_that_is_not_known_is_refused(name: str, value: Tensor) -> None:
    model, _ = prompted(tiny_models.bert)
    with pytest.raises(NotApplicableError, match=f"'{name}' .* says something of each of its 6 tokens"):
        model(input_ids=IDS, **{name: value})


def test_types_of_tokens_under_every_name() -> None:
    reader = Reader()
    inject(reader, PromptTuning(num_virtual_tokens=3))
    types = torch.ones_like(IDS)
    reader(input_ids=IDS, mm_token_type_ids=types)
    assert reader.seen["mm_token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1]] * 2


class Reader(hf.BertForSequenceClassification):
    """A BERT that takes what models of images and text take."""

    def __init__(self) -> None:
        super().__init__(tiny_models.bert().config)

    def forward(self, input_ids: Tensor, mm_token_type_ids: Tensor) -> Any:
        self.seen = {"mm_token_type_ids": mm_token_type_ids}
        return super().forward(input_ids)


def test_in_a_network_around_it() -> None:
    """A user's own module around a transformers model, which it calls for its last hidden states."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = tiny_models.bert(hf.BertModel), nn.Linear(16, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.encoder(ids)[0])

    model = Tagger().eval()
    inject(model, PromptTuning(num_virtual_tokens=VIRTUAL, modules_to_save=["head"]))
    assert model(IDS).shape == (2, 6, 3)
    kinds = {
        path: type(module)
        for path, module in model.named_modules()
        if isinstance(module, PromptedCall | PromptEmbedding)
    }
    assert kinds == {
        "encoder.peft.default": PromptedCall,
        "encoder.embeddings.word_embeddings.peft.default:embedding": PromptEmbedding,
    }
