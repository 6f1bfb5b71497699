"""The adapter's part of a checkpoint: its tensors and its record."""

import copy
import io
from typing import Any

import pytest
import tiny_models
import torch
from snapshot import Snapshot, assert_identical
from torch import nn

from lightning_peft import LoRA, PrefixTuning, VeRA, inject
from lightning_peft.checkpoints.ckpt import (
    METADATA_VERSION,
    adapter_keys,
    adapter_state,
    attach_metadata,
    has_adapters,
    metadata,
)
from lightning_peft.errors import AdapterKeyError, BaseMismatchError, CheckpointError, ConfigError, PEFTError
from lightning_peft.injection.registry import registries

METHOD = LoRA(r=2, target_modules=["query", "value"], rank_pattern={"value": 3})


@pytest.fixture
def base() -> nn.Module:
    return tiny_models.bert().eval()


@pytest.fixture
def trained(base: nn.Module) -> nn.Module:
    model = copy.deepcopy(base)
    inject(model, METHOD)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * torch.randn_like(parameter))
    return model


@pytest.fixture
def recorded(trained: nn.Module) -> dict[str, Any]:
    return metadata(trained)


@pytest.fixture
def state(trained: nn.Module) -> dict[str, torch.Tensor]:
    return adapter_state(trained)


def _through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_what_is_saved_loads_into_a_fresh_base(base: nn.Module, trained: nn.Module) -> None:
    ids = torch.randint(1, 40, (2, 5))
    file = _through_a_file({"record": metadata(trained), "state": adapter_state(trained)})
    fresh = copy.deepcopy(base)
    attach_metadata(fresh, file["record"], file["state"])
    fresh.load_state_dict(file["state"], strict=True)
    assert_identical(fresh(ids).logits, trained(ids).logits)
    assert {p for p, _, _ in registries(fresh)} == {""}


def test_the_state_is_the_adapters_alone(trained: nn.Module) -> None:
    state = adapter_state(trained)
    assert set(state) == adapter_keys(trained) == {key for key in trained.state_dict() if ".peft." in key}
    assert sum(tensor.numel() for tensor in state.values()) == 2 * 2 * 32 + 2 * 3 * 32 + 2 * 16 + 2


def test_a_record_is_made_of_primitives_and_tensors(recorded: dict[str, Any]) -> None:
    assert recorded["version"] == METADATA_VERSION
    (entry,) = recorded["adapters"].values()
    assert entry["path"] == ""
    assert entry["name"] == "default"
    assert entry["method"]["method"] == "LoRA"
    assert entry["method"]["rank_pattern"] == {"value": 3}
    assert str(_through_a_file(recorded)) == str(recorded)


def test_adapters_below_a_model_are_recorded_with_their_path(base: nn.Module, trained: nn.Module) -> None:
    outer = nn.ModuleDict({"student": trained})
    assert all(key.startswith("student.") for key in adapter_keys(outer))
    fresh = nn.ModuleDict({"student": copy.deepcopy(base)})
    attach_metadata(fresh, metadata(outer), adapter_state(outer))
    assert [path for path, _, _ in registries(fresh)] == ["student"]
    fresh.load_state_dict(adapter_state(outer), strict=True)
    ids = torch.arange(1, 6)[None]
    assert_identical(fresh["student"](ids).logits, trained(ids).logits)


def test_a_module_that_is_used_twice_saves_and_loads() -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.Tanh(), shared)

    model, fresh, x = build(), build(), torch.randn(2, 4)
    inject(model, LoRA(r=2))
    nn.init.normal_(model[0].peft.default.lora_B)
    attach_metadata(fresh, metadata(model), adapter_state(model))
    fresh.load_state_dict(adapter_state(model), strict=True)
    assert_identical(fresh(x), model(x))


def test_several_adapters_are_attached_in_their_order(base: nn.Module, trained: nn.Module) -> None:
    inject(trained, LoRA(r=1, target_modules=["key"], modules_to_save=None), "second")
    fresh = copy.deepcopy(base)
    attach_metadata(fresh, metadata(trained), adapter_state(trained))
    ((_, _, registry),) = registries(fresh)
    assert list(registry.attachments) == ["default", "second"]


def test_what_is_attached_already_is_compared(
    trained: nn.Module, recorded: dict[str, Any], base: nn.Module, state: dict[str, torch.Tensor]
) -> None:
    before = Snapshot(trained)
    attach_metadata(trained, recorded, state)
    before.assert_same(trained)
    inject(base, LoRA(r=4, target_modules=["query", "value"]))
    with pytest.raises(CheckpointError, match=r"'default' of the file is another one: r is 2 in the file and 4 here"):
        attach_metadata(base, recorded, state)


def test_an_attached_adapter_that_the_file_lacks_is_an_error(
    trained: nn.Module, recorded: dict[str, Any], state: dict[str, torch.Tensor]
) -> None:
    inject(trained, LoRA(r=1, target_modules=["key"]), "second")
    with pytest.raises(CheckpointError, match="holds no adapter 'second'; it holds 'default'"):
        attach_metadata(trained, recorded, state)


def test_another_base_is_refused_and_left_as_it_was(
    base: nn.Module, recorded: dict[str, Any], state: dict[str, torch.Tensor]
) -> None:
    nn.init.normal_(base.bert.encoder.layer[1].output.dense.weight)
    before = Snapshot(base)
    with pytest.raises(BaseMismatchError, match=r"'bert\.encoder\.layer\.1\.output\.dense\.weight'"):
        attach_metadata(base, recorded, state)
    before.assert_same(base)


def test_a_new_head_of_other_values_is_the_same_base(
    base: nn.Module, recorded: dict[str, Any], state: dict[str, torch.Tensor]
) -> None:
    """The head travels with the adapter, so what it was initialised to does not matter."""
    nn.init.normal_(base.classifier.weight)
    attach_metadata(base, recorded, state)


def test_a_second_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    base: nn.Module, recorded: dict[str, Any], state: dict[str, torch.Tensor]
) -> None:
    wrong = LoRA(r=2, target_modules=["c_attn"]).to_config()
    adapters = {**recorded["adapters"], ":second": {"path": "", "name": "second", "method": wrong}}
    before = Snapshot(base)
    with pytest.raises(PEFTError, match="c_attn"):
        attach_metadata(base, {**recorded, "adapters": adapters}, state)
    before.assert_same(base)


def test_a_path_that_is_not_there_is_an_error_that_says_so(
    base: nn.Module, trained: nn.Module, state: dict[str, torch.Tensor]
) -> None:
    recorded = metadata(nn.ModuleDict({"student": trained}))
    with pytest.raises(CheckpointError, match=r"belongs on 'student', and .* has no such module"):
        attach_metadata(base, recorded, state)


def test_a_newer_version_is_refused_with_what_to_do(
    base: nn.Module, recorded: dict[str, Any], state: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(CheckpointError, match=r"newer lightning_peft \(record version 2.*Upgrade"):
        attach_metadata(base, {**recorded, "version": METADATA_VERSION + 1}, state)


def _entry(recorded: dict[str, Any], **changes: Any) -> dict[str, Any]:
    ((key, entry),) = recorded["adapters"].items()
    return {**recorded, "adapters": {key: {**entry, **changes}}}


def _method(recorded: dict[str, Any], **changes: Any) -> dict[str, Any]:
    ((_, entry),) = recorded["adapters"].items()
    return _entry(recorded, method={**entry["method"], **changes})


DAMAGE: dict[str, Any] = {
    "not a mapping": lambda r: [r],
    "none": lambda r: None,
    "text": lambda r: "lightning_peft",
    "empty": lambda r: {},
    "version is text": lambda r: {**r, "version": "1"},
    "version is zero": lambda r: {**r, "version": 0},
    "no adapters": lambda r: {key: value for key, value in r.items() if key != "adapters"},
    "adapters are a list": lambda r: {**r, "adapters": list(r["adapters"].values())},
    "adapters are none": lambda r: {**r, "adapters": None},
    "an adapter is text": lambda r: {**r, "adapters": {":default": "LoRA"}},
    "an adapter without a name": lambda r: {**r, "adapters": {"x": {"path": "", "method": METHOD.to_config()}}},
    "a name is a list": lambda r: _entry(r, name=["default"]),
    "a name is a number": lambda r: _entry(r, name=3),
    "a name cannot be one": lambda r: _entry(r, name="a.b"),
    "a path is a number": lambda r: _entry(r, path=3),
    "a path is none": lambda r: _entry(r, path=None),
    "no base": lambda r: {key: value for key, value in r.items() if key != "base"},
    "base is none": lambda r: {**r, "base": None},
    "base is cut": lambda r: {**r, "base": {**r["base"], "names": r["base"]["names"][1:]}},
    "a name of the base is a list": lambda r: {**r, "base": {**r["base"], "names": [[]] * len(r["base"]["names"])}},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_a_checkpoint_error(
    base: nn.Module, recorded: dict[str, Any], damage: str, state: dict[str, torch.Tensor]
) -> None:
    before = Snapshot(base)
    with pytest.raises(CheckpointError):
        attach_metadata(base, DAMAGE[damage](recorded), state)
    before.assert_same(base)


METHODS: dict[str, tuple[Any, str]] = {
    "unknown method": (lambda r: _method(r, method="LoRRA"), "no method 'LoRRA'.*Did you mean 'LoRA'"),
    "a path as a method": (lambda r: _method(r, method="os.system"), "no method 'os.system'"),
    "no method": (lambda r: _entry(r, method=None), "no method None"),
    "a list as a method": (lambda r: _entry(r, method=["LoRA"]), "no method"),
    "unknown field": (lambda r: _method(r, rr=3), "LoRA has no field 'rr'.*Did you mean 'r'"),
    "text for a rank": (lambda r: _method(r, r="8"), r"LoRA\.r must be"),
    "a list for a number": (lambda r: _method(r, alpha=[16]), r"LoRA\.alpha must be"),
    "a number for a mapping": (lambda r: _method(r, rank_pattern=3), r"LoRA.*rank_pattern"),
    "a number for names": (lambda r: _method(r, target_modules=3), r"LoRA\.target_modules must be"),
}


@pytest.mark.parametrize("case", METHODS)
def test_a_record_of_a_method_that_cannot_be_is_an_error_of_ours(
    base: nn.Module, recorded: dict[str, Any], case: str, state: dict[str, torch.Tensor]
) -> None:
    damage, message = METHODS[case]
    before = Snapshot(base)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        attach_metadata(base, damage(recorded), state)
    before.assert_same(base)


def test_a_state_of_another_precision_is_refused(
    base: nn.Module, recorded: dict[str, Any], state: dict[str, torch.Tensor]
) -> None:
    before = Snapshot(base)
    for kind in (torch.bfloat16, torch.float64, torch.int64, torch.complex64):
        with pytest.raises(AdapterKeyError, match=f"is {str(kind)[6:]} in the file and must be float"):
            attach_metadata(base, recorded, {key: tensor.to(kind) for key, tensor in state.items()})
    before.assert_same(base)


def test_adapters_that_are_no_numbers_are_refused(
    base: nn.Module, recorded: dict[str, Any], state: dict[str, torch.Tensor]
) -> None:
    key = next(key for key in state if key.endswith("lora_B"))
    for value in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match=f"'{key}' holds NaN or infinite values.*earlier checkpoint"):
            attach_metadata(base, recorded, {**state, key: state[key].index_fill(0, torch.tensor([1]), value)})


STATES: dict[str, tuple[Any, str]] = {
    "missing": (lambda s, key: s.pop(key), "lacks 1 of 10 adapter tensors, first '{}'"),
    "extra": (lambda s, key: s.update({key + "x": torch.ones(1)}), "1 tensors that belong to no.*Did you mean '{}'"),
    "shape": (lambda s, key: s.update({key: torch.ones(9)}), r"'{}' is \[9\] in the file and must have shape"),
    "no tensor": (lambda s, key: s.update({key: "tensor"}), "'{}' is str in the file"),
}


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("attached", [False, True], ids=["fresh", "attached"])
def test_a_state_that_does_not_fit_is_refused_by_name_and_leaves_the_model_as_it_was(
    base: nn.Module, recorded: dict[str, Any], state: dict[str, torch.Tensor], case: str, attached: bool
) -> None:
    change, message = STATES[case]
    if attached:
        inject(base, METHOD)
    first = min(state)
    change(state, first)
    before = Snapshot(base)
    with pytest.raises(AdapterKeyError, match=message.format(first.replace(".", r"\."))):
        attach_metadata(base, recorded, state)
    before.assert_same(base)


def test_adapters_are_seen_on_a_model_and_below_it(base: nn.Module, trained: nn.Module) -> None:
    assert has_adapters(trained)
    assert has_adapters(nn.Sequential(trained))
    assert not has_adapters(base)


def test_two_prefixes_of_one_file_act_together_as_they_did() -> None:
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    trained, fresh, x = copy.deepcopy(base), copy.deepcopy(base), torch.randn(2, 3, 8)
    for name in ("first", "second"):
        inject(trained, PrefixTuning(num_virtual_tokens=2, init_std=1.0), name)
    expected = trained["attention"](x, x, x)[0]
    attach_metadata(fresh, metadata(trained), adapter_state(trained))
    fresh.load_state_dict(adapter_state(trained))
    assert_identical(fresh["attention"](x, x, x)[0], expected)


def test_adapters_on_a_module_and_on_one_inside_of_it_are_refused() -> None:
    outer, inner, fresh = (nn.ModuleDict({"net": nn.ModuleDict({"fc": nn.Linear(4, 4)})}) for _ in range(3))
    inject(outer, LoRA(r=2), "a")
    inject(inner["net"], LoRA(r=2), "b")
    both = {**metadata(outer), "adapters": {**metadata(outer)["adapters"], **metadata(inner)["adapters"]}}
    before = Snapshot(fresh)
    with pytest.raises(CheckpointError, match="'net' is inside of another module with adapters"):
        attach_metadata(fresh, both, adapter_state(outer) | adapter_state(inner))
    before.assert_same(fresh)


def test_what_is_no_number_is_refused_in_buffers_too() -> None:
    trained, fresh = (nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in "ab")
    fresh.load_state_dict(trained.state_dict())
    inject(trained, VeRA(r=2))
    state = {key: tensor.clone() for key, tensor in adapter_state(trained).items()}
    next(tensor for key, tensor in state.items() if key.endswith(".A")).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        attach_metadata(fresh, metadata(trained), state)


def test_a_fully_trained_module_may_hold_a_mask_of_infinities() -> None:
    class Head(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    trained = nn.ModuleDict({"fc": nn.Linear(4, 4), "head": Head()})
    fresh = copy.deepcopy(trained)
    inject(trained, LoRA(r=2, target_modules=["fc"], modules_to_save=["head"]))
    for _ in "ab":  # new, and there already
        attach_metadata(fresh, metadata(trained), adapter_state(trained))
    assert list(adapter_state(fresh)) == list(adapter_state(trained))
