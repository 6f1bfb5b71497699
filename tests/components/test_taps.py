"""What one adapter of a forward pass hands to another one."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from placing import Place, Scale
from torch import Tensor, nn

from lightning_peft import inject
from lightning_peft.components.taps import Capture, Tap
from lightning_peft.core.adapter import OutputAdapter
from lightning_peft.core.method import Placement, Plan


def test_a_value_is_taken_once() -> None:
    tap = Tap()
    assert tap.take() is None
    tap.put(3)
    assert tap.take() == 3
    assert tap.take() is None


def test_copies_and_pickles_are_empty_and_do_not_share() -> None:
    tap = Tap()
    tap.put(torch.ones(2, requires_grad=True) * 2)  # no leaf: it cannot be copied
    duplicates = [copy.deepcopy(tap), copy.copy(tap), pickle.loads(pickle.dumps(tap))]
    assert [duplicate.take() for duplicate in duplicates] == [None] * 3
    duplicates[0].put(5)
    assert duplicates[1].take() is None
    assert tap.take().tolist() == [2, 2]


def test_each_thread_has_a_value_of_its_own() -> None:
    tap = Tap()
    tap.put("here")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(tap.take).result() is None
        pool.submit(tap.put, "there").result()
        assert tap.take() == "here"
        assert pool.submit(tap.take).result() == "there"


def test_a_capture_takes_the_first_input_and_changes_nothing() -> None:
    tap = Tap()
    capture = Capture(tap)
    x = torch.randn(2)
    assert capture((x, 1), {"a": 2}) == ((x, 1), {"a": 2})
    assert tap.take() is x
    assert capture((), {"query": x, "key": 1}) == ((), {"query": x, "key": 1})
    assert tap.take() is x
    assert not list(capture.parameters())


class Add(OutputAdapter):
    """Adds what is in a tap."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.tap, self.factor = tap, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.factor * self.tap.take()


@dataclass(frozen=True, kw_only=True)
class Across(Place):
    """The input of one layer, added to the output of another."""

    def plan(self, model: nn.Module, saved: Any) -> Plan:
        tap = Tap()
        return Plan([Placement("0", Capture(tap), "x"), Placement("1", Add(tap))])


def test_a_tap_reaches_from_layer_to_layer_and_a_copy_has_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x, other = torch.randn(3, 4), torch.randn(3, 4)
    expected, expected_other = model(x) + x, model(other) + other
    inject(model, Across(adapters={}))
    torch.testing.assert_close(model(x), expected)
    twin = copy.deepcopy(model)
    assert twin[0].peft.get_submodule("default:x").tap is twin[1].peft.default.tap
    assert twin[1].peft.default.tap is not model[1].peft.default.tap
    model[0](x)  # a forward that ends in between
    torch.testing.assert_close(twin(other), expected_other)
    torch.testing.assert_close(model(other), expected_other)


def test_what_is_captured_is_what_other_adapters_made_of_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    inject(model, Across(adapters={}), "a")
    inject(model, Place(adapters={"0": Scale, "1": Scale}), "b")
    inner = model[0]
    with torch.no_grad():
        h = 2 * (x @ inner.weight.T + inner.bias)
        expected = 2 * (h @ model[1].weight.T + model[1].bias + x)
    torch.testing.assert_close(model(x), expected)
