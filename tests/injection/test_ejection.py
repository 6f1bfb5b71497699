"""What only training needed can be dropped, and nothing else changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from snapshot import Snapshot
from torch import nn

from lightning_peft import BottleneckAdapter, Combine, LoRA, Method, PrefixTuning, eject, inject, remove, report
from lightning_peft.checkpoints.ckpt import adapter_keys, adapter_state, attach_metadata, metadata

PREFIX = PrefixTuning(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=7)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "bert": (tiny_models.bert, lambda: {"input_ids": torch.randint(1, 40, (2, 5))}),
    "t5": (tiny_models.t5, lambda: {"input_ids": torch.randint(1, 40, (2, 5)), "labels": torch.ones(2, 4).long()}),
    "torch": (lambda: nn.TransformerEncoderLayer(12, 2, 17, batch_first=True), lambda: {"src": torch.randn(2, 5, 12)}),
}


def run(model: nn.Module, example: dict[str, Any]) -> torch.Tensor:
    output = model(**example)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("method", [PREFIX, Combine([PREFIX, LoRA(r=2)])], ids=["prefix", "combine"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_without_its_mlp_computes_the_same(name: str, method: Method) -> None:
    build, example = MODELS[name]
    base = build().eval()
    plain, before = copy.deepcopy(base), Snapshot(base)
    inject(base, method)
    inputs = example()
    expected = run(base, inputs)
    trained = report(base).trainable
    eject(base)
    torch.testing.assert_close(run(base, inputs), expected)
    assert report(base).trainable < trained
    assert adapter_keys(base) == {key for key in base.state_dict() if ".peft." in f".{key}"}
    assert not any("down" in key or ".up." in key for key in adapter_keys(base))

    # What is left is a flat prefix: a file of it attaches to a fresh base.
    attach_metadata(plain, metadata(base), adapter_state(base))
    plain.load_state_dict(adapter_state(base))
    torch.testing.assert_close(run(plain, inputs), expected)
    run(base, inputs).sum().backward()
    assert all(p.grad is not None for p in base.parameters() if p.requires_grad)
    base.zero_grad()
    remove(base)
    before.assert_same(base)


def test_what_has_nothing_to_drop_stays() -> None:
    model = tiny_models.bert()
    inject(model, Combine([PrefixTuning(num_virtual_tokens=2), BottleneckAdapter(preset="parallel")]))
    before = Snapshot(model)
    eject(model)
    before.assert_same(model)
