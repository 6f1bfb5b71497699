"""Norms, told by torch's classes and by structure."""

from collections.abc import Callable

import pytest
import tiny_models
import torch
import transformers as hf
from torch import nn
from torch.nn.parameter import UninitializedParameter
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from lightning_peft import BottleneckAdapter, LayerNormTuning, inject
from lightning_peft.network.norms import find_norms, is_norm


class OwnNorm(nn.Module):
    """What people write themselves, under any name."""

    def __init__(self, *names: str, shape: tuple[int, ...] = (4,)) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


class Parent(OwnNorm):
    def __init__(self) -> None:
        super().__init__("weight")
        self.child = nn.Linear(2, 2)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = UninitializedParameter()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(4),
    "LayerNorm without bias": lambda: nn.LayerNorm(4, bias=False),
    "LayerNorm over two dimensions": lambda: nn.LayerNorm((3, 4)),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm3d": lambda: nn.BatchNorm3d(4),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "LlamaRMSNorm": lambda: LlamaRMSNorm(4),
    "T5LayerNorm": lambda: T5LayerNorm(4),
    "Gemma3RMSNorm": lambda: Gemma3RMSNorm(4),
    "one's own": lambda: OwnNorm("weight"),
    "one's own with a bias": lambda: OwnNorm("weight", "bias"),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm without parameters": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "BatchNorm without parameters": lambda: nn.BatchNorm1d(4, affine=False),
    "InstanceNorm without parameters": lambda: nn.InstanceNorm2d(4),
    "PReLU": lambda: nn.PReLU(4),
    "Linear": lambda: nn.Linear(4, 1),
    "Conv1d": lambda: nn.Conv1d(4, 4, 1),
    "Embedding": lambda: nn.Embedding(4, 1),
    "Conv1D": lambda: Conv1D(4, 4),
    "LSTM": lambda: nn.LSTM(4, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "a matrix": lambda: OwnNorm("weight", shape=(4, 4)),
    "a bias alone": lambda: OwnNorm("bias"),
    "another vector": lambda: OwnNorm("weight", "bias", "temperature"),
    "a vector of another name": lambda: OwnNorm("gamma"),
    "a module with children": Parent,
    "a layer without values": Lazy,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_known(name: str) -> None:
    norm = NORMS[name]()
    assert is_norm(norm)
    assert find_norms(nn.Sequential(nn.Linear(2, 2), norm)) == [("1", norm)]
    assert find_norms(norm) == [("", norm)]


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_none(name: str) -> None:
    assert not is_norm(OTHERS[name]())


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (tiny_models.bert, 1 + 2 * 2),
        (tiny_models.gpt2, 2 * 2 + 1),
        (tiny_models.llama, 2 * 2 + 1),
        (tiny_models.t5, 2 * 2 + 1 + 2 * 3 + 1),
        (tiny_models.bart, 1 + 2 * 2 + 1 + 2 * 3),
        (tiny_models.whisper, 2 * 2 + 1 + 2 * 3 + 1),
        (tiny_models.vit, 2 * 2 + 1),
        (tiny_models.deberta, 1 + 2 * 2),
        (lambda: nn.Transformer(8, 2, 1, 1, 12, batch_first=True), 2 + 1 + 3 + 1),
    ],
    ids=["bert", "gpt2", "llama", "t5", "bart", "whisper", "vit", "deberta", "transformer"],
)
def test_all_norms_of_a_model_are_found_in_order(build: Callable[[], nn.Module], count: int) -> None:
    model = build()
    found = find_norms(model)
    named = [(path, module) for path, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    assert found == [(path, module) for path, module in named if any(True for _ in module.parameters())]
    assert len(found) == count


def test_those_of_an_adapter_are_none_of_the_base() -> None:
    model = tiny_models.bert()
    before = find_norms(model)
    inject(model, BottleneckAdapter(layer_norm="before"))
    assert any(isinstance(module, nn.LayerNorm) and ".peft." in path for path, module in model.named_modules())
    assert find_norms(model) == before


def test_a_norm_that_carries_an_adapter_is_still_one() -> None:
    model = tiny_models.llama()
    before = find_norms(model)
    inject(model, LayerNormTuning())
    assert "peft" in model.model.norm._modules
    assert find_norms(model) == before


def test_a_module_that_is_used_twice_is_found_once() -> None:
    norm = nn.LayerNorm(4)
    assert find_norms(nn.Sequential(norm, nn.Tanh(), norm)) == [("0", norm)]


def test_the_meta_device_is_no_hindrance() -> None:
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    assert len(find_norms(model)) == 25
