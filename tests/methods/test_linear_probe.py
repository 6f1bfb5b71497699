"""The linear probe trains the head, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from plain_training import IDS, assert_trains_as_plain_torch, logits, trained
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import LinearProbe, Method, inject, merge, remove
from lightning_peft.errors import ConfigError, NotApplicableError, TargetError


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def _x(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 12).view(3, 4))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, list[str], Callable[[nn.Module], Tensor]]] = {
    "bert": (tiny_models.bert, "auto", ["classifier.weight", "classifier.bias"], logits),
    "gpt2": (lambda: tiny_models.gpt2(hf.GPT2ForTokenClassification), "auto", None, logits),
    "named": (_net, ["2"], ["2.weight", "2.bias"], _x),
    "tied": (tiny_models.llama, ["lm_head"], ["lm_head.weight"], logits),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_the_head_itself(case: str) -> None:
    build, head, names, run = CASES[case]
    model = build()
    if case == "tied":  # the head gets a copy of its own: the embedding is no part of a probe
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    names = names or [name for name, _ in model.named_parameters() if name.startswith("classifier.")]
    assert_trains_as_plain_torch(model, LinearProbe(modules_to_save=head), names, run)
    expected = run(model)
    merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)


def test_a_tied_head_trains_alone() -> None:
    model = tiny_models.llama().eval()
    report = inject(model, LinearProbe(modules_to_save=["lm_head"]))
    assert report.trainable == 40 * 16
    hidden = model.model(IDS).last_hidden_state
    trained(model, logits)
    assert torch.equal(model.model(IDS).last_hidden_state, hidden)


def test_the_report_says_that_the_head_is_trained_whole() -> None:
    report = inject(tiny_models.bert(), LinearProbe())
    assert [(row.host, row.adapter_type, row.trainable) for row in report.hosts] == [
        ("classifier", "fully trained", 34)
    ]
    assert [(part.path, part.state) for part in report.parts] == [("bert", "frozen"), ("classifier", "fully trained")]


def test_no_gradient_is_computed_below_the_head() -> None:
    model = tiny_models.bert()
    inject(model, LinearProbe())
    seen: list[bool] = []
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    logits(model).sum().backward()
    assert seen == [False]


def test_removed_every_bit_of_the_base_is_back() -> None:
    model = tiny_models.bert()
    before = Snapshot(model)
    inject(model, LinearProbe())
    trained(model, logits)
    remove(model)
    before.assert_same(model)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (_net, {}, r"'auto' finds no task head in Sequential\. Name the head, as in .*; parts of it here: 0, 2\."),
        (lambda: nn.ModuleDict({"net": _net()}), {}, r"parts of it here: net\.0, net\.2\."),
        (nn.Tanh, {}, "parts of it here: none"),
        (tiny_models.llama, {}, r"'auto' finds no task head in LlamaForCausalLM.*here: model, lm_head\."),
        (tiny_models.bert, {"modules_to_save": None}, "modules_to_save=None leaves nothing to train"),
        (tiny_models.bert, {"modules_to_save": []}, r"modules_to_save=\[\] leaves nothing to train"),
    ],
)
def test_without_a_head_it_is_refused(build: Callable[[], nn.Module], fields: dict[str, Any], message: str) -> None:
    model = build()
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=message):
        inject(model, LinearProbe(**fields))
    before.assert_same(model)


def test_a_head_that_is_not_there_is_an_error() -> None:
    with pytest.raises(TargetError, match=r"no module with parameters is called 'clasifier'.*mean 'classifier'"):
        inject(tiny_models.bert(), LinearProbe(modules_to_save=["clasifier"]))


@pytest.mark.parametrize("value", [3, "", [""], [1], {"a": 1}])
def test_the_field_is_checked(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"LinearProbe\.modules_to_save must be a non-empty string or a list of them"):
        LinearProbe(modules_to_save=value)


def test_it_survives_being_written_down() -> None:
    method = LinearProbe(modules_to_save=["head"])
    assert method.to_config() == {"method": "LinearProbe", "modules_to_save": ["head"]}
    assert Method.from_config(method.to_config()) == method
