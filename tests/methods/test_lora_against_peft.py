"""LoRA against the peft package: with the same factors both compute the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lightning_peft import LoRA, inject

# peft asks transformers a question by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Wrapped(nn.Module):
    """peft wants the adapted layer below a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Tensor:
        output = self.layer(*args)
        return output if isinstance(output, Tensor) else output[0]


def _ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, tiny_models.VOCABULARY, (2, 6))}


def _attention() -> tuple[Tensor, ...]:
    return torch.randn(5, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    # model, input, fields of LoRA, and what peft calls them where the names differ
    "linear": (
        lambda: Wrapped(nn.Linear(6, 7)),
        lambda: (torch.randn(2, 5, 6),),
        {"target_modules": ["layer"]},
        {},
    ),
    "rslora": (
        lambda: Wrapped(nn.Linear(6, 7)),
        lambda: (torch.randn(2, 5, 6),),
        {"target_modules": ["layer"], "use_rslora": True},
        {"use_rslora": True},
    ),
    "embedding": (
        lambda: Wrapped(nn.Embedding(11, 6, padding_idx=0)),
        lambda: (torch.randint(11, (3, 4)),),
        {"target_modules": ["layer"]},
        {},
    ),
    "conv2d": (
        lambda: Wrapped(nn.Conv2d(3, 7, (3, 2), (2, 1), (1, 2))),  # peft forgets the dilation
        lambda: (torch.randn(2, 3, 8, 7),),
        {"target_modules": ["layer"]},
        {},
    ),
    "conv1d": (
        lambda: Wrapped(nn.Conv1d(3, 7, 3, 2, 1)),
        lambda: (torch.randn(2, 3, 9),),
        {"target_modules": ["layer"]},
        {},
    ),
    "attention": (
        lambda: Wrapped(nn.MultiheadAttention(8, 2)),
        _attention,
        {"target_modules": ["in_proj"]},  # peft counts the product of out_proj twice, and gives it no gradient
        {"target_modules": ["layer"]},
    ),
    "gpt2": (
        tiny_models.gpt2,
        _ids,
        {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"]},
        {"fan_in_fan_out": True},
    ),
    "bert": (tiny_models.bert, _ids, {"target_modules": ["query", "value", "dense"]}, {}),
    "llama_patterns": (
        tiny_models.llama,
        _ids,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 4, r"layers\.1\.mlp\.down_proj": 2},
            "alpha_pattern": {"q_proj": 7},
        },
        {"rank_pattern": {"v_proj": 4, r"layers\.1\.mlp\.down_proj": 2}, "alpha_pattern": {"q_proj": 7}},
    ),
}


def _pair(case: str) -> tuple[nn.Module, nn.Module, Any, list[tuple[nn.Parameter, nn.Parameter]]]:
    """Our model, peft's with the same factors, an input, and the pairs of parameters."""
    build, example, fields, renamed = CASES[case]
    ours = build().eval()
    theirs = copy.deepcopy(ours)
    inject(ours, LoRA(r=3, alpha=5.0, modules_to_save=None, **fields))
    config = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "target_modules": fields["target_modules"], **renamed}
    wrapped = get_peft_model(theirs, LoraConfig(**config)).eval()
    layers = {
        name.removeprefix("base_model.model."): m for name, m in wrapped.named_modules() if isinstance(m, LoraLayer)
    }
    pairs = []
    for path, host in ours.named_modules():
        for adapter in getattr(host, "peft", nn.ModuleList()).children():
            layer = layers.pop(path)
            if "default" in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            else:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            pairs += [(adapter.lora_A, a), (adapter.lora_B, b)]
    # What is left starts as zero and stays so: of attention, peft always adapts out_proj as well.
    assert [path for path in layers if not path.endswith("base_layer.out_proj")] == []
    with torch.no_grad():
        for mine, other in pairs:
            nn.init.normal_(mine, std=0.3)
            other.copy_(mine.view_as(other))
    return ours, wrapped, example(), pairs


def _run(model: nn.Module, example: Any) -> Tensor:
    return model(**example).logits if isinstance(example, dict) else model(*example)


@pytest.mark.parametrize("case", CASES)
def test_the_output_equals_pefts(case: str) -> None:
    ours, theirs, example, _ = _pair(case)
    torch.testing.assert_close(_run(ours, example), _run(theirs, example), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_equal_pefts(case: str) -> None:
    ours, theirs, example, pairs = _pair(case)
    for model in (ours, theirs):
        _run(model, example).square().mean().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad.view_as(mine), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["linear", "embedding", "conv2d", "bert"])
def test_as_many_parameters_train_as_in_peft(case: str) -> None:
    ours, theirs, _, _ = _pair(case)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert counts[0] == counts[1]
