"""What Combine refuses, and how a combination is merged."""

from collections.abc import Callable

import pytest
import tiny_models
import torch
from perturbation import adapted
from snapshot import Snapshot, assert_identical
from torch import nn

from lightning_peft import (
    IA3,
    BitFit,
    BottleneckAdapter,
    Combine,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    inject,
    merge,
)
from lightning_peft.core.method import Method
from lightning_peft.errors import ConfigError, NotApplicableError, NotMergeableError

IDS = torch.arange(1, 11).view(2, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Combine([]), r"Combine\.methods must be a list of two or more methods.*, not \[\]"),
        (lambda: Combine([LoRA()]), r"Combine\.methods must be a list of two or more"),
        (lambda: Combine([LoRA(), Combine()]), r"methods must be a list of two or more methods, none of them Combine"),
        (lambda: Combine(LoRA()), r"Combine\.methods must be a list of methods, such as \[LoRA\(r=8\)"),
        (lambda: Combine(LoRA(), IA3()), r"give either methods, as one list, or one of the presets mam, unipelt"),
        (lambda: Combine("mam"), r"Combine\.methods must be a list of methods, .* not 'mam'"),
        (lambda: Combine({"a": LoRA(), "b": IA3()}), r"Combine\.methods must be a list of methods"),
        (lambda: Combine([LoRA, IA3]), r"Combine\.methods must be a list of methods"),
        (lambda: Combine([LoRA(), {"method": "IA3"}]), r"Combine\.methods must be a list of methods"),
        (lambda: Combine(3), r"Combine\.methods must be a list of methods"),
        (lambda: Combine(preset="unipellt"), r"not preset='unipellt'\. Did you mean 'unipelt'\?"),
        (lambda: Combine(preset=["mam"]), r"one of the presets mam, unipelt; not preset=\['mam'\]"),
        (lambda: Combine([LoRA(), IA3()], preset="mam"), r"give either methods, .*; not preset='mam' with methods\.$"),
        (lambda: Combine([], preset="mam"), r"not preset='mam' with methods\.$"),
        (lambda: Combine([PromptTuning(), PTuning()]), "PromptTuning and PTuning both bring a prompt, and"),
        (lambda: Combine([PromptTuning(), LoRA(), PromptTuning()]), "PromptTuning both bring a prompt"),
        (lambda: Combine([PrefixTuning(), PrefixTuning()]), "PrefixTuning and PrefixTuning both bring a prefix"),
        (lambda: Combine([LoRA(modules_to_save=["a"]), IA3()]), r"LoRA has modules_to_save=\['a'\]. Give that"),
        (lambda: Combine([LoRA(), IA3(modules_to_save="a")], modules_to_save=["a"]), "IA3 has modules_to_save='a'"),
        (lambda: Combine([LoRA(), IA3()], modules_to_save=5), r"Combine\.modules_to_save must be .*not 5"),
        (lambda: Combine([LoRA(), IA3()], modules_to_save=[""]), r"Combine\.modules_to_save must be"),
        (lambda: Combine([LoRA(), IA3()], modules_to_save=""), r"Combine\.modules_to_save must be"),
    ],
)  # fmt: skip
def test_what_makes_no_combination_is_an_error(make: Callable[[], Combine], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_prompt_and_a_prefix_go_together_and_modules_to_save_may_be_repeated() -> None:
    Combine([PromptTuning(), PrefixTuning()])
    Combine([LoRA(modules_to_save=["a"]), IA3(modules_to_save=None)], modules_to_save=["a"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([LoRA(target_modules=["0"]), PromptTuning()], "PromptTuning"),
        ([PromptTuning(), LoRA(target_modules=["0"])], "PromptTuning"),
        ([LoRA(target_modules=["0"]), PrefixTuning()], "PrefixTuning finds no attention"),
        ([LoRA(target_modules=["0"]), BottleneckAdapter()], "BottleneckAdapter"),
    ],
    ids=str,
)
def test_a_part_that_does_not_apply_says_so_and_nothing_is_changed(parts: list[Method], message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    before = Snapshot(model)
    with pytest.raises(NotApplicableError, match=message):
        inject(model, Combine(parts))
    before.assert_same(model)


# Merging -------------------------------------------------------------------------------------------------------------

EVERYWHERE = LoRA(r=2, target_modules=["attention", "ffn"])


@pytest.mark.parametrize(
    "parts",
    [
        [EVERYWHERE, IA3()],
        [IA3(), EVERYWHERE],
        [EVERYWHERE, BitFit()],
        [BitFit(), EVERYWHERE],
        [BitFit(), IA3()],
        [IA3(), BitFit()],
        [LoRA(r=2), LoRA(r=3, target_modules=["query", "dense"])],
    ],
    ids=lambda parts: "_".join(type(part).__name__ for part in parts),
)
def test_the_merged_model_computes_the_same(parts: list[Method]) -> None:
    model = adapted(tiny_models.bert(), Combine(parts, modules_to_save=None))
    expected = model(input_ids=IDS).logits
    merge(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "part",
    [PrefixTuning(num_virtual_tokens=2), PromptTuning(num_virtual_tokens=2), BottleneckAdapter(width=2)],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False])
def test_one_part_that_cannot_be_merged_leaves_all_unmerged(part: Method, first: bool) -> None:
    model = adapted(tiny_models.bert(), Combine([part, LoRA(r=2)] if first else [LoRA(r=2), part]))
    before, expected = Snapshot(model), model(input_ids=IDS).logits
    with pytest.raises(NotMergeableError):
        merge(model)
    before.assert_same(model)
    assert_identical(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    "parts",
    [
        [PrefixTuning(num_virtual_tokens=2), BottleneckAdapter(width=2)],
        [BottleneckAdapter(width=2), PrefixTuning(num_virtual_tokens=2)],
    ],
    ids=["prefix first", "adapter first"],
)
def test_a_prefix_and_an_adapter_on_one_attention_of_torch(parts: list[Method]) -> None:
    layer = adapted(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), Combine(parts))
    layer(torch.randn(2, 5, 8)).square().sum().backward()
    assert not [
        name for name, p in layer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
