"""Recognising a base model again."""

import copy
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from lightning_peft import LoRA, inject
from lightning_peft.checkpoints.fingerprint import check_base, fingerprint
from lightning_peft.errors import BaseMismatchError, CheckpointError


@pytest.fixture
def net() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(20, 6), "norm": nn.BatchNorm1d(6), "head": nn.Linear(6, 2)})


@pytest.fixture
def recorded(net: nn.Module) -> dict[str, Any]:
    return fingerprint(net)


def test_a_base_is_known_by_names_shapes_dtypes_and_samples(net: nn.Module, recorded: dict[str, Any]) -> None:
    assert recorded["names"] == list(net.state_dict())
    assert recorded["shapes"][:2] == [[6, 20], [6]]
    assert recorded["dtypes"][0] == "float32"
    assert recorded["dtypes"][-3:] == ["int64", "float32", "float32"]
    assert recorded["samples"].shape == (len(recorded["names"]), 8)
    assert recorded["samples"].dtype == torch.float64
    assert recorded["samples"][0, 0] == net["body"].weight.flatten()[0]
    assert recorded["samples"][0, -1] == net["body"].weight.flatten()[-1]


def test_the_same_base_passes(net: nn.Module, recorded: dict[str, Any]) -> None:
    check_base(copy.deepcopy(net), recorded)


@pytest.mark.parametrize("there", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("here", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_of_the_same_weights_passes(there: torch.dtype, here: torch.dtype) -> None:
    model = tiny_models.llama()
    recorded = fingerprint(copy.deepcopy(model).to(there))
    check_base(model.to(here), recorded)


def test_a_base_rounded_twice_passes(net: nn.Module, recorded: dict[str, Any]) -> None:
    check_base(net.bfloat16().float(), fingerprint(copy.deepcopy(net)))


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16])
def test_other_weights_are_refused_by_the_first_tensor_that_differs(net: nn.Module, there: torch.dtype) -> None:
    recorded = fingerprint(copy.deepcopy(net).to(there))
    nn.init.normal_(net["head"].weight)
    with pytest.raises(BaseMismatchError, match=r"'head\.weight' differ.*sampled \[.*Load the base model that"):
        check_base(net, recorded)


def test_other_running_statistics_are_other_weights(net: nn.Module, recorded: dict[str, Any]) -> None:
    net["norm"].running_mean.add_(1)
    with pytest.raises(BaseMismatchError, match=r"'norm\.running_mean'"):
        check_base(net, recorded)


def test_a_tensor_that_became_nan_is_refused_and_one_that_was_nan_passes(net: nn.Module) -> None:
    with torch.no_grad():
        net["body"].bias.fill_(float("nan"))
    check_base(net, fingerprint(net))
    healthy = nn.Linear(3, 3)
    recorded = fingerprint(healthy)
    with torch.no_grad():
        healthy.bias.fill_(float("nan"))
    with pytest.raises(BaseMismatchError, match="'bias'"):
        check_base(healthy, recorded)


def test_another_shape_is_refused_with_both(net: nn.Module, recorded: dict[str, Any]) -> None:
    net["head"] = nn.Linear(6, 3)
    with pytest.raises(BaseMismatchError, match=r"'head\.weight' has shape \[3, 6\] here and \[2, 6\]"):
        check_base(net, recorded)


def test_a_missing_tensor_is_refused_by_name(net: nn.Module, recorded: dict[str, Any]) -> None:
    net["heads"] = net.pop("head")
    with pytest.raises(BaseMismatchError, match=r"'head\.weight', which ModuleDict does not.*mean 'heads\.weight'"):
        check_base(net, recorded)


def test_an_extra_tensor_is_refused_by_name(net: nn.Module, recorded: dict[str, Any]) -> None:
    net["extra"] = nn.Linear(2, 2)
    with pytest.raises(BaseMismatchError, match=r"'extra\.weight' of ModuleDict was not there"):
        check_base(net, recorded)


def test_a_deeper_model_is_not_the_same_base() -> None:
    recorded = fingerprint(tiny_models.bert(num_hidden_layers=1))
    with pytest.raises(BaseMismatchError):
        check_base(tiny_models.bert(num_hidden_layers=2), recorded)


def test_the_adapters_are_no_part_of_the_base(net: nn.Module, recorded: dict[str, Any]) -> None:
    inject(net, LoRA(r=2))
    assert fingerprint(net)["names"] == recorded["names"]
    check_base(net, recorded)


def test_the_adapters_of_a_module_that_is_used_twice_are_no_part_of_the_base() -> None:
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": shared})
    recorded = fingerprint(net)
    inject(net, LoRA(r=2))
    assert fingerprint(net)["names"] == recorded["names"]


def test_a_module_that_travels_with_the_adapter_may_differ(net: nn.Module) -> None:
    other = copy.deepcopy(net)
    nn.init.normal_(other["head"].weight)
    inject(net, LoRA(r=2, target_modules=["body"], modules_to_save=["head"]))
    recorded = fingerprint(net)
    assert [name for name in recorded["names"] if name.startswith("head")] == []
    check_base(other, recorded, fully_trained=("head",))
    with pytest.raises(BaseMismatchError, match=r"'head\.weight' of ModuleDict was not there"):
        check_base(other, recorded)


def test_on_the_meta_device_only_names_and_shapes_are_compared(recorded: dict[str, Any]) -> None:
    with torch.device("meta"):
        net = nn.ModuleDict({"body": nn.Linear(20, 6), "norm": nn.BatchNorm1d(6), "head": nn.Linear(6, 2)})
    check_base(net, recorded)


def test_a_base_without_tensors_has_a_fingerprint() -> None:
    check_base(nn.ReLU(), fingerprint(nn.ReLU()))


def test_a_tensor_of_one_and_of_no_element_is_sampled() -> None:
    net = nn.ParameterDict({"a": nn.Parameter(torch.ones(())), "b": nn.Parameter(torch.ones(0, 3))})
    recorded = fingerprint(net)
    assert recorded["samples"].tolist() == [[1.0] * 8, [0.0] * 8]
    check_base(net, recorded)


def test_a_fingerprint_survives_a_safe_file(net: nn.Module, recorded: dict[str, Any], tmp_path: Any) -> None:
    torch.save(recorded, tmp_path / "record.pt")
    check_base(net, torch.load(tmp_path / "record.pt", weights_only=True))


DAMAGE: dict[str, Any] = {
    "no mapping": lambda r: [1, 2],
    "none": lambda r: None,
    "empty": lambda r: {},
    "no samples": lambda r: {key: value for key, value in r.items() if key != "samples"},
    "samples are a list": lambda r: {**r, "samples": r["samples"].tolist()},
    "samples are cut": lambda r: {**r, "samples": r["samples"][:-1]},
    "samples are narrow": lambda r: {**r, "samples": r["samples"][:, :3]},
    "names are cut": lambda r: {**r, "names": r["names"][:-1]},
    "names are a number": lambda r: {**r, "names": 7},
    "a name is a list": lambda r: {**r, "names": [["a"], *r["names"][1:]]},
    "shapes are cut": lambda r: {**r, "shapes": r["shapes"][1:]},
    "dtypes are none": lambda r: {**r, "dtypes": None},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_fingerprint_is_a_checkpoint_error(net: nn.Module, recorded: dict[str, Any], damage: str) -> None:
    with pytest.raises(CheckpointError, match=r"damaged|another base"):
        check_base(net, DAMAGE[damage](recorded))
