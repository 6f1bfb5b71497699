"""The checksum of nested values: equal for equal content, and another for each single change."""

from collections import OrderedDict
from copy import deepcopy
from typing import Any

import pytest
import torch

from lightning_peft.checkpoints.checksum import checksum

CONTENT: dict[str, Any] = {
    "tensor": torch.arange(6.0).reshape(2, 3),
    "low": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(1),
    "list": [1, 2.5, "a", None, True, b"x"],
    "deep": {"a": {"b": (1, 2)}, 3: "three"},
    "set": {"x", "y"},
}


def test_order_containers_views_and_copies_make_no_difference() -> None:
    other = OrderedDict(reversed(list(deepcopy(CONTENT).items())))
    other["tensor"] = torch.arange(6.0).reshape(3, 2).T.contiguous().T.reshape(2, 3)
    other["list"], other["deep"]["a"]["b"] = tuple(other["list"]), [1, 2]
    assert checksum(other) == checksum(CONTENT)
    assert len(checksum(CONTENT)) == 64


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tensor",), torch.arange(6.0).reshape(3, 2)),
        (("tensor",), torch.arange(6.0, dtype=torch.float64).reshape(2, 3)),
        (("tensor",), torch.tensor([[0.0, 1, 2], [3, 4, 5.0001]])),
        (("low",), torch.ones(3, dtype=torch.float16)),
        (("scalar",), 1),
        (("list", 0), 1.0),
        (("list", 0), True),
        (("list", 2), b"a"),
        (("list", 3), 0),
        (("deep", "a", "b"), (2, 1)),
        (("deep", 3), "four"),
        (("set",), {"x"}),
        (("more",), None),
    ],
)
def test_each_change_makes_another(path: tuple[Any, ...], value: Any) -> None:
    changed = deepcopy(CONTENT)
    place: Any = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert checksum(changed) != checksum(CONTENT)


def test_of_other_objects_the_type_counts() -> None:
    assert checksum([object()]) == checksum([object()]) != checksum([Exception()])
    assert checksum(float("nan")) == checksum(float("nan"))
