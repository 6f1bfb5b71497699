"""The ways to train a model that are compared, each on a model of its own."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lightning_peft
from lightning_peft import inject

from .shapes import Shape


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model, ready to train."""

    name: str
    model: nn.Module
    call: Callable[..., Any]
    """The model, or what torch has compiled of it."""
    example: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer | None

    def forward(self) -> Tensor:
        loss: Tensor = self.call(**self.example).loss
        return loss

    def step(self) -> None:
        """One training step."""
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def adapter_bytes(self) -> int:
        """What of the trained parameters is stored."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)


def _floor(model: nn.Module, shape: Shape, stack: ExitStack) -> nn.Module:
    """Frozen; a gradient passes through all of it, to its embeddings."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


def _full(model: nn.Module, shape: Shape, stack: ExitStack) -> nn.Module:
    return model


def _peft(model: nn.Module, shape: Shape, stack: ExitStack) -> nn.Module:
    return _by_peft(model, shape)


def _peft_without_casts(model: nn.Module, shape: Shape, stack: ExitStack) -> nn.Module:
    """peft's fastest setting: adapters in the base's dtype, and inputs left as they are."""
    model = _by_peft(model, shape, autocast_adapter_dtype=False)
    stack.enter_context(peft.helpers.disable_input_dtype_casting(model))
    return model


def _by_peft(model: nn.Module, shape: Shape, **options: Any) -> nn.Module:
    task = "SEQ_CLS" if shape.labels else "CAUSAL_LM"
    low_rank = {"r": shape.r, "lora_alpha": 16, "lora_dropout": shape.dropout, "target_modules": "all-linear"}
    config = {
        "LoRA": lambda: peft.LoraConfig(task_type=task, **low_rank),
        "DoRA": lambda: peft.LoraConfig(task_type=task, use_dora=True, **low_rank),
        "IA3": lambda: peft.IA3Config(task_type=task),
        "PrefixTuning": lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=_PREFIX),
    }[shape.method]()
    return peft.get_peft_model(model, config, **options)


def _plain_torch(model: nn.Module, shape: Shape, stack: ExitStack) -> nn.Module:
    """A bottleneck behind each feedforward part, as one would write it by hand."""
    model.requires_grad_(False)
    width = model.config.hidden_size
    for mlp in [module for name, module in model.named_modules() if name.endswith(".mlp")]:
        mlp.bottleneck = nn.Sequential(nn.Linear(width, width // 16), nn.ReLU(), nn.Linear(width // 16, width))
        mlp.register_forward_hook(lambda mlp, args, y: y + mlp.bottleneck(y))
    return model


def _ours(model: nn.Module, shape: Shape, stack: ExitStack) -> nn.Module:
    method = {
        "LoRA": lambda: lightning_peft.LoRA(r=shape.r, alpha=16, dropout=shape.dropout),
        "DoRA": lambda: lightning_peft.DoRA(r=shape.r, alpha=16, dropout=shape.dropout),
        "IA3": lambda: lightning_peft.IA3(),
        "PrefixTuning": lambda: lightning_peft.PrefixTuning(num_virtual_tokens=_PREFIX),
        "BottleneckAdapter": lambda: lightning_peft.BottleneckAdapter(target_modules=["mlp"]),
    }[shape.method]()
    inject(model, method)
    return model


_PREFIX = 20  # virtual tokens
BUILDERS: dict[str, Callable[[nn.Module, Shape, ExitStack], nn.Module]] = {
    "floor": _floor,
    "full fine-tuning": _full,
    "peft": _peft,
    "peft, no casts": _peft_without_casts,
    "plain torch": _plain_torch,
    "ours": _ours,
}
COMPILED = "ours, compiled"


def variants_of(shape: Shape, compiled: bool) -> list[str]:
    """Names of what is compared."""
    if shape.method == "BottleneckAdapter":  # peft has none
        return ["floor", "plain torch", "ours"]
    others = ["peft, no casts"] if shape.method in ("LoRA", "DoRA") else []
    full = ["full fine-tuning"] if shape.method == "LoRA" else []
    return ["floor", *full, "peft", *others, "ours", *([COMPILED] if compiled else [])]


def build(name: str, shape: Shape, device: str, stack: ExitStack) -> Variant:
    """Build the variant ``name``; ``stack`` holds what has to be left at the end."""
    model = BUILDERS["ours" if name == COMPILED else name](shape.model(device), shape, stack)
    # The embeddings would be frozen, were it not for full fine-tuning; peft and this library let nothing else train.
    parameters = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = torch.compile(model) if name == COMPILED else model
    return Variant(
        name=name,
        model=model,
        call=call,
        example=shape.example(model, device),
        optimizer=torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None,
    )
