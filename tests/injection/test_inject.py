"""Injection: all or nothing, under a name that can be one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models
import torch
from placing import Place, Scale, Shift
from snapshot import Snapshot
from torch import nn

from lightning_peft import LoRA, active_adapters, inject, remove
from lightning_peft.core.method import Method, Placement, Plan
from lightning_peft.errors import AdapterNameError, ConfigError, NotApplicableError, PEFTError, TargetError
from lightning_peft.injection.slots import AdapterSlots, named_slots
from lightning_peft.network.walk import base_modules


@pytest.fixture
def net() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(4, 6), "norm": nn.BatchNorm1d(6), "head": nn.Linear(6, 2)})


class WithPeft(nn.Linear):
    """A host with an attribute of the name that adapters take."""

    def __init__(self, peft: Any) -> None:
        super().__init__(4, 4)
        self.peft = peft


ERRORS: dict[str, tuple[Callable[[nn.Module], object], type[PEFTError], str]] = {
    "target": (lambda net: inject(net, LoRA(target_modules=["bodi"])), TargetError, "Did you mean 'body'"),
    "one of two targets": (lambda net: inject(net, LoRA(r=2, target_modules=["body", "x"])), TargetError, "'x'"),
    "saved module": (
        lambda net: inject(net, LoRA(r=2, target_modules=["body"], modules_to_save=["x"])),
        TargetError,
        "modules_to_save",
    ),
    "bad name": (lambda net: inject(net, LoRA(r=2), "a.b"), AdapterNameError, "'a.b' cannot be the name"),
    "no method": (lambda net: inject(net, {"r": 8}), ConfigError, "a method such as LoRA"),
    "a class": (lambda net: inject(net, LoRA), ConfigError, "a method such as LoRA"),
    "twice on one host": (lambda net: inject(net, Twice()), ConfigError, "2 adapters of one name on 'body'"),
}


@dataclass(frozen=True, kw_only=True)
class Twice(Method):
    """Asks for two adapters in one slot."""

    modules_to_save: list[str] | str | None = None

    def plan(self, model: nn.Module, saved: Sequence[str]) -> Plan:
        return Plan([Placement("body", Scale()), Placement("body", Shift())])


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_an_error_leaves_the_model_as_it_was(net: nn.Module, case: str, adapted: bool) -> None:
    fails, error, message = ERRORS[case]
    net["head"].weight.requires_grad_(False)
    if adapted:
        inject(net, LoRA(r=2, target_modules=["body"]), "first")
    before = Snapshot(net)
    with pytest.raises(error, match=message):
        fails(net)
    before.assert_same(net)


def test_a_method_that_fails_while_it_plans_leaves_the_model_as_it_was(net: nn.Module) -> None:
    def broken() -> nn.Module:
        raise RuntimeError("no memory")

    before = Snapshot(net)
    with pytest.raises(RuntimeError, match="no memory"):
        inject(net, Place(adapters={"body": Scale, "head": broken}))
    before.assert_same(net)


@pytest.mark.parametrize(
    "name",
    [
        *("", "a.b", "a:b", "a b", "-a", "a\n", "ä.", "forward", "training", "add", "activate", "_modules"),
        *("_default", "_handles", "dump_patches", "T_destination"),
        *(None, 3, ("a",)),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(net: nn.Module, name: Any) -> None:
    before = Snapshot(net)
    with pytest.raises(AdapterNameError, match="cannot be the name of an adapter"):
        inject(net, LoRA(r=2), name)
    before.assert_same(net)


@pytest.mark.parametrize("name", ["a", "A-1", "0", "größe", "my_task", "peft", "lora_A"])
def test_a_name_of_letters_digits_and_dashes_is_taken(net: nn.Module, name: str) -> None:
    inject(net, LoRA(r=2), name)
    assert active_adapters(net) == (name,)
    assert f"body.peft.{name}.lora_A" in net.state_dict()
    remove(net, name)


def test_a_taken_name_is_refused_and_says_by_what(net: nn.Module) -> None:
    inject(net, LoRA(r=2, alpha=3))
    before = Snapshot(net)
    with pytest.raises(AdapterNameError, match=r"an adapter 'default' already \(LoRA\(.*alpha=3"):
        inject(net, LoRA(r=2))
    before.assert_same(net)


@pytest.mark.parametrize(
    "peft",
    [lambda: nn.Linear(4, 4), lambda: "mine", lambda: nn.Parameter(torch.ones(2))],
    ids=["child", "text", "tensor"],
)
def test_an_attribute_called_peft_is_never_overwritten(peft: Callable[[], Any]) -> None:
    net = nn.ModuleDict({"host": WithPeft(peft()), "other": nn.Linear(4, 4)})
    before = Snapshot(net)
    with pytest.raises(AdapterNameError, match=r"'host' \(WithPeft\) has an attribute 'peft' of its own.*rename"):
        inject(net, LoRA(r=2, target_modules=["host", "other"]))
    before.assert_same(net)


@pytest.mark.parametrize(
    "container",
    [nn.Sequential(nn.Linear(2, 2)), nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleDict({"a": nn.Linear(2, 2)})],
)
def test_a_container_cannot_be_a_host(container: nn.Module) -> None:
    net = nn.ModuleDict({"layers": container})
    before = Snapshot(net)
    with pytest.raises(ConfigError, match=f"'layers' is a {type(container).__name__}.*target a layer inside it"):
        inject(net, Place(adapters={"layers": Scale}))
    before.assert_same(net)


def test_a_sequential_model_takes_adapters_on_its_layers() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)
    expected = net(x)
    report = inject(net, LoRA(r=2))
    assert [row.host for row in report.hosts] == ["0", "2"]
    torch.testing.assert_close(net(x), expected)


def test_a_lazy_layer_is_refused() -> None:
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.LazyLinear(2)})
    with pytest.raises(NotApplicableError, match="at 'head' has no weight yet"):
        inject(net, LoRA(r=2, target_modules=["body"]))
    assert "peft" not in net["body"]._modules
    assert net["body"].weight.requires_grad


def test_a_parametrized_layer_is_refused() -> None:
    """torch.nn.utils.parametrizations.weight_norm, as in wav2vec2: the weight is computed, no parameter."""
    net = nn.ModuleDict({"body": nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), "head": nn.Linear(6, 2)})
    before = Snapshot(net)
    with pytest.raises(NotApplicableError, match="body"):
        inject(net, LoRA(r=2, target_modules=["body"]))
    before.assert_same(net)


def test_the_adapter_lies_below_its_host_and_the_classes_stay() -> None:
    model = tiny_models.llama()
    classes = {path: type(module) for path, module in model.named_modules()}
    inject(model, LoRA(target_modules=["q_proj"]), "task")
    assert {path: type(module) for path, module in base_modules(model)} == classes
    slots = {path: slots for path, _, slots in named_slots(model)}
    assert list(slots) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert all(isinstance(s, AdapterSlots) and list(s._modules) == ["task"] for s in slots.values())


def test_several_weights_of_one_host_have_a_slot_each() -> None:
    attention = nn.MultiheadAttention(8, 2)
    inject(attention, LoRA(r=2, target_modules=["in_proj", "out_proj"]), "a")
    assert list(attention.peft._modules) == ["a:in_proj_weight", "a:out_proj_weight"]
    inject(attention, LoRA(r=2, target_modules=["in_proj"]), "b")
    remove(attention, "a")
    assert list(attention.peft._modules) == ["b:in_proj_weight"]


def test_names_that_begin_alike_are_told_apart(net: nn.Module) -> None:
    inject(net, LoRA(r=2, target_modules=["body"]), "a")
    inject(net, LoRA(r=2, target_modules=["body"]), "ab")
    remove(net, "a")
    assert [key for key in net.state_dict() if ".peft." in key] == ["body.peft.ab.lora_A", "body.peft.ab.lora_B"]
    assert active_adapters(net) == ("ab",)


def test_all_of_the_base_is_frozen_once_and_thawed_as_it_was(net: nn.Module) -> None:
    net["head"].bias.requires_grad_(False)
    inject(net, LoRA(r=2), "a")
    inject(net, LoRA(r=2), "b")
    assert not any(p.requires_grad for name, p in net.named_parameters() if ".peft." not in name)
    remove(net, "a")
    assert not any(p.requires_grad for name, p in net.named_parameters() if ".peft." not in name)
    remove(net, "b")
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {"head.bias"}


def test_tied_parameters_thaw_together() -> None:
    model = tiny_models.llama()
    before = Snapshot(model)
    inject(model, LoRA(target_modules=["q_proj"]))
    assert not model.lm_head.weight.requires_grad
    remove(model)
    before.assert_same(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("known", [True, False])
def test_removing_what_is_not_there_is_an_error_that_says_what_is(net: nn.Module, known: bool) -> None:
    if known:
        inject(net, LoRA(r=2), "english")
    with pytest.raises(AdapterNameError, match="no adapter 'englisch'") as error:
        remove(net, "englisch")
    assert ("Did you mean 'english'" if known else "inject(model, method) first") in str(error.value)


def test_an_adapter_of_a_part_is_removed_from_the_whole_and_not_the_other_way_round() -> None:
    net = nn.ModuleDict({"encoder": nn.ModuleDict({"body": nn.Linear(4, 4)}), "head": nn.Linear(4, 2)})
    before = Snapshot(net)
    inject(net["encoder"], LoRA(r=2))
    assert active_adapters(net) == ("default",)
    remove(net)
    before.assert_same(net)
    inject(net, LoRA(r=2))
    with pytest.raises(AdapterNameError, match="call this with the module you injected on"):
        remove(net["encoder"])


def test_injection_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = tiny_models.bert()
    report = inject(model, LoRA(r=2, target_modules=["query"], modules_to_save=None))
    assert all(p.is_meta for p in model.parameters())
    assert report.trainable == 2 * 2 * (16 + 16)


def test_one_name_on_two_parts_has_to_be_addressed_by_its_part() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    inject(net[0], LoRA(r=2))
    inject(net[1], LoRA(r=2))
    with pytest.raises(AdapterNameError, match="on '0', '1'"):
        remove(net)
    remove(net[0])
    remove(net)
    assert not any("peft" in key for key in net.state_dict())
