"""P-tuning: the encoder that makes a prompt, what trains, and what is refused."""

import copy
import math
from typing import Any

import pytest
import tiny_models
import torch
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

from lightning_peft import PTuning, inject
from lightning_peft.checkpoints.ckpt import adapter_state
from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.methods.p_tuning import EncodedPrompt

IDS = torch.tensor([[9, 7, 12, 33, 21, 8], [8, 7, 5, 11, 3, 4]])


def _encoded(model: nn.Module, **fields: Any) -> EncodedPrompt:
    inject(model, PTuning(**{"num_virtual_tokens": 5, "modules_to_save": None, **fields}))
    return next(module for module in model.modules() if isinstance(module, EncodedPrompt))


def _lstm(layer: nn.LSTM, x: Tensor, number: int, suffix: str) -> Tensor:
    """One direction of one layer, step by step: (P, d) to (P, h)."""
    names = (f"{name}_l{number}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    w_x, w_h, b_x, b_h = (getattr(layer, name) for name in names)
    h = c = torch.zeros(layer.hidden_size)
    steps = []
    for step in x.flip(0) if suffix else x:
        i, f, g, o = (w_x @ step + b_x + w_h @ h + b_h).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append(h)
    return torch.stack(steps[::-1] if suffix else steps)


def test_the_mlp_written_out() -> None:
    prompt = _encoded(tiny_models.bert(), encoder_hidden_size=7)
    first, _, second, _, third = prompt.mlp
    assert [tuple(layer.weight.shape) for layer in (first, second, third)] == [(7, 16), (7, 7), (16, 7)]
    expected = third(second(first(prompt.embedding).relu()).relu())
    torch.testing.assert_close(prompt(), expected)
    assert prompt().shape == (5, 16)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_lstm_written_out(layers: int) -> None:
    prompt = _encoded(tiny_models.bert(), encoder="lstm", encoder_hidden_size=7, encoder_num_layers=layers)
    first, _, second = prompt.mlp
    assert [tuple(layer.weight.shape) for layer in (first, second)] == [(14, 14), (16, 14)]
    x = prompt.embedding
    for number in range(layers):
        x = torch.cat([_lstm(prompt.lstm, x, number, suffix) for suffix in ("", "_reverse")], 1)
    torch.testing.assert_close(prompt(), second(first(x).relu()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 5 * 16 + 3 * (16 * 16 + 16)),  # the hidden size is the model's width
        ({"encoder_hidden_size": 7}, 5 * 16 + (16 * 7 + 7) + (7 * 7 + 7) + (7 * 16 + 16)),
        (
            {"encoder": "lstm", "encoder_hidden_size": 7, "encoder_num_layers": 1},
            5 * 16 + 2 * 4 * 7 * (16 + 7 + 2) + (14 * 14 + 14) + (14 * 16 + 16),
        ),
        ({"encoder": "mlp", "encoder_num_layers": 9}, 5 * 16 + 3 * (16 * 16 + 16)),  # of the LSTM alone
    ],
)
def test_vectors_and_encoder_train(fields: dict[str, Any], count: int) -> None:
    model = tiny_models.gpt2()
    _encoded(model, **fields)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert sum(x.numel() for x in adapter_state(model).values()) == count
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_training_resumes_exactly(encoder: str) -> None:
    base = tiny_models.gpt2().eval()
    state = {key: x.clone() for key, x in base.state_dict().items()}

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny_models.gpt2().eval()
        model.load_state_dict(state)
        _encoded(model, encoder=encoder, encoder_hidden_size=7)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()

    model, optimizer = fresh()
    for _ in range(2):
        step(model, optimizer)
    kept, kept_optimizer = copy.deepcopy((adapter_state(model), optimizer.state_dict()))
    resumed, resumed_optimizer = fresh()
    assert not torch.equal(resumed(IDS).logits, model(IDS).logits)
    assert resumed.load_state_dict(kept, strict=False).unexpected_keys == []
    resumed_optimizer.load_state_dict(kept_optimizer)
    for _ in range(2):
        step(model, optimizer)
        step(resumed, resumed_optimizer)
    assert_identical(resumed(IDS).logits, model(IDS).logits)


def test_dropout_between_layers_acts_in_training_alone() -> None:
    prompt = _encoded(tiny_models.gpt2(), encoder="lstm", encoder_dropout=0.5)
    prompt.eval()
    assert torch.equal(prompt(), prompt())
    prompt.train()
    assert not torch.equal(prompt(), prompt())
    single = _encoded(tiny_models.gpt2(), encoder="lstm", encoder_dropout=0.5, encoder_num_layers=1).train()
    assert torch.equal(single(), single())  # nothing lies between


@pytest.mark.compat
def test_the_prompt_is_made_once_for_a_text_and_not_for_each_token_generated() -> None:
    model = tiny_models.gpt2(eos_token_id=None).eval()
    calls: list[int] = []
    _encoded(model).register_forward_hook(lambda *_: calls.append(1))
    model(IDS)
    assert len(calls) == 1
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    assert len(calls) == 2


def test_a_seed_makes_it_again() -> None:
    prompts = []
    for seed in (1, 1, 2):
        model = tiny_models.gpt2()
        torch.manual_seed(seed)
        prompts.append(_encoded(model)())
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.allclose(prompts[0], prompts[2])


BAD: dict[str, list[Any]] = {
    "num_virtual_tokens": [0, -1, 1.5, True, None, "3"],
    "encoder": ["gru", None, 3, ["mlp"]],
    "encoder_hidden_size": [0, -1, 2.0, False, "7"],
    "encoder_num_layers": [0, 1.0, True, None],
    "encoder_dropout": [-0.1, 1, 1.5, True, None, "0", math.nan, math.inf],
    "modules_to_save": [3, "", [""], [None], True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_field_with_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"PTuning\.{name} must be .*, not "):
        PTuning(**{name: value})


def test_a_model_without_tokens_is_refused_and_left_alone() -> None:
    model = tiny_models.whisper()
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match="PTuning puts virtual tokens before a text"):
        inject(model, PTuning())
    before.assert_same(model)
