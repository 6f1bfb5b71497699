"""Values against declared types."""

from collections.abc import Mapping
from typing import Any, Literal

import pytest

from lightning_peft import LoRA
from lightning_peft.core.fields import Count, expected, fits
from lightning_peft.core.method import Method, registered_methods
from lightning_peft.errors import ConfigError


@pytest.mark.parametrize(
    ("declared", "good", "bad"),
    [
        (int, [0, -1, 10**30], [True, 1.0, "1", None]),
        (float, [0.5, 1, float("inf")], [True, "1", None, [1.0]]),
        (bool, [True], [1, "true", None]),
        (str, ["", "a"], [b"a", None, ["a"]]),
        (int | None, [None, 1], [False, "1"]),
        (list[int], [[], [1], (1, 2)], [[True], ["1"], "12", 1, {1: 2}]),
        (list[str] | str | None, [None, "a", ["a"], {"a"}], [[1], [["a"]], {"a": 1}, b"a"]),
        (frozenset[str], [["a"], {"a"}], ["a", [1]]),
        (tuple[int, str], [(1, "a"), [1, "a"]], [(1,), ("a", 1), (1, "a", 2)]),
        (tuple[int, ...], [(), (1, 2, 3)], [("a",)]),
        (dict[str, int], [{}, {"a": 1}], [{1: 1}, {"a": "1"}, [("a", 1)]]),
        (Mapping[str, float], [{"a": 1}], [{"a": None}]),
        (Literal["a", 1], ["a", 1], ["b", True, 1.0, ["a"]]),
        (float | Literal["learned"], [1.0, "learned"], ["other"]),
        (list[Method], [[LoRA()]], [[{"method": "LoRA"}], LoRA()]),
        (list, [[1, "a"]], ["a"]),
        (Count, [1, 5], [0, -1, True, 1.0, "1", None]),
        (dict[str, Count], [{"a": 1}], [{"a": 0}, {1: 1}]),
        (Any, [None, 1, [object()]], []),
    ],
)
def test_a_value_fits_its_declared_type(declared, good, bad):
    assert all(fits(value, declared) for value in good)
    assert not any(fits(value, declared) for value in bad)


def test_what_a_field_asks_for_is_said_as_the_end_of_a_sentence():
    kinds = [int, list[str], Count, Count | None, bool | None, Literal["a", "b"], Literal["a"] | float]
    assert [expected(kind) for kind in kinds] == [
        "a whole number",
        "list[str]",
        "at least 1 and whole",
        "at least 1 and whole, or null",
        "true or false, or null",
        "one of 'a', 'b'",
        "one of 'a', or a number",
    ]
    assert expected(dict[str, Count], 3) == "a mapping"
    assert expected(dict[str, Count], {3: 2}) == "keyed by strings"
    assert expected(dict[str, Count], {"q": 0}) == "at least 1 and whole"


ODD = {
    "none": None,
    "true": True,
    "negative": -1,
    "float": 0.5,
    "huge": 10**5000,
    "infinite": 1e400,
    "nan": float("nan"),
    "empty": "",
    "text": "os.system",
    "pattern": "(",
    "bytes": b"\0",
    "list": [],
    "lists": [["a"]],
    "numbers": [10**30],
    "dict": {},
    "mixed": {1: 2},
    "method": {"method": "LoRA", "r": "x"},
    "set": {1, "a"},
    "object": object(),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("method", [m for m in registered_methods() if m.__module__.startswith("lightning_peft.")])
def test_whatever_a_field_holds_a_method_is_made_or_refused(method, odd):
    for name in method.field_names():
        try:
            made = Method.from_config({"method": method.__name__, name: ODD[odd]})
        except ConfigError:
            continue
        assert fits(getattr(made, name), method.__dataclass_fields__[name].type)


def test_methods_inside_each_other_without_end_are_refused():
    config: dict[str, Any] = {"method": "LoRA"}
    for _ in range(5000):
        config = {"method": "Combine", "methods": [config, config]}
    with pytest.raises(ConfigError):
        Method.from_config(config)
