"""Modules that are fully trained beside the adapters."""

import pytest
import tiny_models
import torch
import transformers as hf
from snapshot import Snapshot, assert_identical
from torch import Tensor, nn

from lightning_peft import LoRA, activate, active, disabled, inject, merge, merged, remove
from lightning_peft.checkpoints.ckpt import adapter_keys, adapter_state
from lightning_peft.components.modules_to_save import resolve_modules_to_save
from lightning_peft.errors import TargetError


class Tagger(nn.Module):
    """A network of plain torch with one of each kind of module that one may want to train whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.lstm = nn.LSTM(8, 5, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body(self.table(ids))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = self.lstm(x)[0]
        x = x + self.attention(x, x, x)[0]
        return self.head(x)


METHOD = {"r": 2, "target_modules": ["body"]}
PARTS = ["table", "norm", "lstm", "attention", "head"]


@pytest.fixture
def net() -> Tagger:
    return Tagger()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(9, (4, 6))


def _train(model: nn.Module, ids: Tensor, steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: tiny_models.bert(), ["classifier"]),
        (lambda: tiny_models.gpt2(hf.GPT2ForTokenClassification), ["classifier"]),
        (lambda: tiny_models.t5(hf.T5ForSequenceClassification), ["classification_head"]),
        (lambda: tiny_models.llama(), []),
        (Tagger, []),
    ],
    ids=["bert", "gpt2", "t5", "causal_lm", "plain"],
)
def test_auto_means_the_task_head(model: type[nn.Module], expected: list[str]) -> None:
    assert resolve_modules_to_save(model(), "auto") == expected


def test_none_and_an_empty_list_save_nothing() -> None:
    assert resolve_modules_to_save(tiny_models.bert(), None) == []
    assert resolve_modules_to_save(tiny_models.bert(), []) == []


def test_named_modules_are_saved_in_place_of_the_head() -> None:
    assert resolve_modules_to_save(tiny_models.bert(), "pooler") == ["bert.pooler"]
    assert resolve_modules_to_save(tiny_models.bert(), ["classifier", "pooler"]) == ["classifier", "bert.pooler"]


def test_a_name_that_is_not_there_is_an_error_and_changes_nothing() -> None:
    model = tiny_models.bert()
    before = Snapshot(model)
    with pytest.raises(TargetError, match="modules_to_save: no module with parameters is called 'clasifier'"):
        inject(model, LoRA(target_modules=["query"], modules_to_save=["clasifier"]))
    before.assert_same(model)


@pytest.mark.parametrize("part", PARTS)
def test_a_saved_module_starts_as_it_was_and_every_parameter_of_it_trains(net: Tagger, ids: Tensor, part: str) -> None:
    expected = net.eval()(ids)
    own = {name: p.detach().clone() for name, p in net.get_submodule(part).named_parameters()}
    before = Snapshot(net)
    inject(net, LoRA(**METHOD, modules_to_save=[part]))
    torch.testing.assert_close(net(ids), expected)
    copies = {name: p for name, p in net.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert sum(p.numel() for p in copies.values()) == sum(p.numel() for p in own.values())
    assert all(name.startswith(f"{part}.") and ".peft.default." in name for name in copies)
    values = {name: p.detach().clone() for name, p in copies.items()}
    _train(net, ids)
    for name, parameter in copies.items():
        assert parameter.grad is not None, name
        assert not torch.equal(parameter, values[name]), f"{name} did not train"
    for name, value in own.items():
        assert_identical(net.get_parameter(f"{part}.{name}"), value, name)
    assert not torch.allclose(net.eval()(ids), expected, atol=1e-3)
    with disabled(net):
        torch.testing.assert_close(net(ids), expected)
    remove(net)
    torch.testing.assert_close(net(ids), expected)
    before.assert_same(net)


@pytest.mark.parametrize("part", PARTS)
def test_a_saved_module_alone_explains_what_changed(net: Tagger, ids: Tensor, part: str) -> None:
    """Merged, the base has the trained values in its own parameters."""
    inject(net, LoRA(**METHOD, modules_to_save=[part]))
    _train(net, ids)
    trained = net.eval()(ids)
    with merged(net):
        torch.testing.assert_close(net(ids), trained, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net(ids), trained)
    keys = list(Tagger().state_dict())
    merge(net)
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(net(ids), trained, rtol=1e-5, atol=1e-6)


def test_a_saved_batchnorm_moves_statistics_of_its_own(net: Tagger, ids: Tensor) -> None:
    mean, count = net.norm.running_mean.clone(), net.norm.num_batches_tracked.clone()
    inject(net, LoRA(**METHOD, modules_to_save=["norm"]))
    _train(net, ids, steps=3)
    saved = net.norm.peft.default
    assert not torch.equal(saved.running_mean, mean)
    assert saved.num_batches_tracked == 3
    assert_identical(net.norm.running_mean, mean)
    assert_identical(net.norm.num_batches_tracked, count)
    assert {"norm.peft.default.running_mean", "norm.peft.default.num_batches_tracked"} <= adapter_keys(net)


def test_a_saved_batchnorm_moves_its_statistics_beside_a_bf16_base(net: Tagger) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.body(x))

    model = Normed()
    inject(model, LoRA(**METHOD, modules_to_save=["norm"]))
    model.train().bfloat16()
    base = model.norm.running_mean.clone()
    before = model.norm.peft.default.running_mean.clone()
    model(torch.randn(8, 4, dtype=torch.bfloat16)).sum().backward()
    assert not torch.equal(model.norm.peft.default.running_mean, before)
    assert model.norm.peft.default.num_batches_tracked == 1
    assert_identical(model.norm.running_mean, base)


def test_the_bases_statistics_stay_when_a_saved_batchnorm_is_disabled_in_train_mode(net: Tagger, ids: Tensor) -> None:
    inject(net, LoRA(**METHOD, modules_to_save=["norm"]))
    mean = net.norm.running_mean.clone()
    net.train()
    with disabled(net):
        net(ids)
    assert_identical(net.norm.running_mean, mean)


def test_a_batchnorm_that_is_not_saved_stays_in_eval(net: Tagger, ids: Tensor) -> None:
    mean = net.norm.running_mean.clone()
    inject(net, LoRA(**METHOD, modules_to_save=["head"]))
    expected = net.eval()(ids)
    net.train()
    torch.testing.assert_close(net(ids), expected)
    assert_identical(net.norm.running_mean, mean)


def test_a_saved_modules_state_loads_strictly(net: Tagger, ids: Tensor) -> None:
    fresh = Tagger()
    fresh.load_state_dict(net.state_dict())
    method = LoRA(**METHOD, modules_to_save=PARTS)
    inject(net, method)
    _train(net, ids)
    inject(fresh, method)
    fresh.load_state_dict(adapter_state(net))
    assert_identical(fresh.eval()(ids), net.eval()(ids))


def test_two_adapters_have_a_copy_each_and_none_of_each_others(net: Tagger, ids: Tensor) -> None:
    inject(net, LoRA(**METHOD, modules_to_save=["head"]), "a")
    _train(net, ids)
    trained = net.eval()(ids)
    inject(net, LoRA(**METHOD, modules_to_save=["head"]), "b")
    keys = {key for key in adapter_state(net) if key.startswith("head.")}
    assert keys == {f"head.{i}.peft.{n}.{p}" for i in (0, 2) for n in "ab" for p in ("weight", "bias")}
    with active(net, "a"):
        torch.testing.assert_close(net(ids), trained, rtol=1e-5, atol=1e-6)
    activate(net, "b")
    _train(net, ids)
    activate(net, "a")
    torch.testing.assert_close(net.eval()(ids), trained, rtol=1e-5, atol=1e-6)


def test_a_copy_beside_a_bf16_base_trains_in_full_precision() -> None:
    net = tiny_models.bert().bfloat16()
    inject(net, LoRA(target_modules=["query"]))
    saved = net.classifier.peft.default
    assert saved.weight.dtype == torch.float32
    ids = torch.randint(1, 40, (2, 5))
    assert net(ids).logits.dtype == torch.bfloat16
    net(ids).logits.float().sum().backward()
    assert saved.weight.grad.dtype == torch.float32


def test_what_was_frozen_in_a_saved_module_trains_as_well(net: Tagger) -> None:
    net.head.requires_grad_(False)
    inject(net, LoRA(**METHOD, modules_to_save=["head"]))
    assert all(p.requires_grad for p in net.head[0].peft.parameters())
    remove(net)
    assert not any(p.requires_grad for p in net.head.parameters())
