"""Methods as primitives and back, and how they are found."""

import json
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

import pytest
from torch import nn

from lightning_peft import LoRA, methods
from lightning_peft.core.method import Method, Plan, registered_methods
from lightning_peft.core.targeted import LayerMethod
from lightning_peft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Nested(Method):
    """A method that is made of others and of a dataclass."""

    parts: list[Method] = field(default_factory=list)
    names: frozenset[str] = frozenset()
    modules_to_save: list[str] | str | None = None

    def plan(self, model: nn.Module, saved: Sequence[str]) -> Plan:
        return Plan([])


def test_a_method_becomes_primitives_and_back() -> None:
    method = LoRA(r=4, alpha=2.5, target_modules=["q", "v"], layers=[-1], rank_pattern={"q": 2}, use_rslora=True)
    config = method.to_config()
    assert config["method"] == "LoRA"
    assert config["layers"] == [-1]
    assert json.loads(json.dumps(config)) == config
    assert Method.from_config(config) == method


def test_tuples_and_sets_become_lists() -> None:
    assert LoRA(target_modules=("a", "b")).to_config()["target_modules"] == ["a", "b"]
    assert Nested(names=frozenset({"b", "a"})).to_config()["names"] == ["a", "b"]


def test_methods_inside_a_method_come_back_as_methods() -> None:
    method = Nested(parts=[LoRA(r=2), Nested(parts=[LoRA(r=3)])])
    config = method.to_config()
    assert config["parts"][1]["parts"][0]["r"] == 3
    found = Method.from_config(config)
    assert found.to_config() == config
    assert found.parts[0] == LoRA(r=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "lora"}, "no method 'lora'; methods: .*LoRA.*Did you mean 'LoRA'"),
        ({"method": "LayerMethod"}, "no method 'LayerMethod'"),
        ({"method": "torch.nn.Linear"}, "no method 'torch.nn.Linear'"),
        ({"r": 8}, "no method None"),
        ({"method": 3}, "no method 3"),
        ("LoRA", "no method 'LoRA'"),
        (None, "no method None"),
        ({"method": "LoRA", "lora_alpha": 8, "r": 2}, "LoRA has no field 'lora_alpha'; fields: .*'alpha'"),
        ({"method": "LoRA", 3: 8}, "LoRA has no field '3'"),
        ({"method": "LoRA", "r": "8"}, r"LoRA\.r must be at least 1 and whole, not '8'"),
        ({"method": "LoRA", "r": None}, r"LoRA\.r must be"),
        ({"method": "LoRA", "rank_pattern": 3}, r"LoRA\.rank_pattern must be"),
        ({"method": "LoRA", "alpha_pattern": [["q", 2.0]]}, r"LoRA\.alpha_pattern must be"),
        ({"method": "LoRA", "layers": "01"}, r"LoRA\.layers must be a list of layer indices"),
    ],
)
def test_a_config_that_names_no_method_is_an_error(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Method.from_config(config)


def test_a_method_is_found_by_being_a_subclass() -> None:
    found = list(registered_methods())
    assert LoRA in found
    assert Nested in found
    assert LayerMethod not in found
    assert len(found) == len(set(found))


def test_every_method_of_the_package_is_exported_and_frozen() -> None:
    ours = {
        method.__name__: method for method in registered_methods() if method.__module__.startswith("lightning_peft.")
    }
    assert ours.keys() == set(methods.__all__)
    for name, method in ours.items():
        assert getattr(methods, name) is method
        with pytest.raises(FrozenInstanceError):
            method().modules_to_save = "changed"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ""}, "target_modules must be a non-empty string or a list of them, not ''"),
        ({"target_modules": 3}, "target_modules must be"),
        ({"target_modules": ["q", ""]}, "target_modules must be"),
        ({"target_modules": ["q", 3]}, "target_modules must be"),
        ({"exclude_modules": ""}, "exclude_modules must be"),
        ({"exclude_modules": {"q": 1}}, "exclude_modules must be"),
        ({"modules_to_save": ""}, "modules_to_save must be"),
        ({"modules_to_save": True}, "modules_to_save must be"),
        ({"layers": 3}, "layers must be a list of layer indices, or None for all, not 3"),
        ({"layers": []}, "layers must be"),
        ({"layers": [1.0]}, "layers must be"),
        ({"layers": [True]}, "layers must be"),
        ({"layers": ["1"]}, "layers must be"),
    ],
)
def test_a_field_that_chooses_layers_is_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"LoRA\.{message}"):
        LoRA(**fields)


def test_fields_have_names_and_no_positions() -> None:
    with pytest.raises(TypeError):
        LoRA(8)
