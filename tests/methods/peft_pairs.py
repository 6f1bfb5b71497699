"""One model twice, with an adapter of ours and with peft's, and the same weights in both.

Where peft has more than one way to read a setting, the pairs are set up so that both mean the same thing; what was
found of that stands beside the setting.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import peft
import pytest
import tiny_models
import torch
import transformers as hf
from peft import TaskType
from torch import Tensor, nn

from lightning_peft import IA3, DoRA, LoRA, PrefixTuning, PromptTuning, PTuning, inject
from lightning_peft.injection.slots import named_slots
from lightning_peft.methods.p_tuning import EncodedPrompt
from lightning_peft.methods.prefix_tuning import Prefix, Trunk
from lightning_peft.methods.prompt_tuning import Prompt

VIRTUAL, HIDDEN = 3, 7
_T = TypeVar("_T")

MODELS: dict[str, tuple[Callable[[], nn.Module], TaskType]] = {
    "bert": (tiny_models.bert, TaskType.SEQ_CLS),
    "gpt2": (tiny_models.gpt2, TaskType.CAUSAL_LM),
    "llama": (tiny_models.llama, TaskType.CAUSAL_LM),
    "t5": (tiny_models.t5, TaskType.SEQ_2_SEQ_LM),
}
METHODS = (
    "LoRA", "LoRA-dora", "IA3", "PrefixTuning", "PrefixTuning-mlp", "PromptTuning", "PTuning-mlp", "PTuning-lstm"
)  # fmt: skip

_LORA = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "t5": ["q", "v", "o", "wi_0", "wo"],
}
# Our choice, and the same for peft, whose patterns know no roles. Its own for BERT, "output.dense", takes the output of
# the attention along, and ours spares the query of GPT-2's fused layer, so there both are told.
_IA3: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bert": (
        {},
        {
            "target_modules": r".*(key|value|layer\.\d\.output\.dense)",
            "feedforward_modules": r".*layer\.\d\.output\.dense",
        },
    ),
    "gpt2": 2 * ({"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]},),
    "llama": ({}, {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "t5": ({}, {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}),
}


@contextmanager
def peft_calls() -> Iterator[None]:
    """Within the ``with`` block, peft may call transformers by a name that is deprecated; we may not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        yield


def ask_peft(run: Callable[[], _T]) -> _T:
    """What peft computes by itself; a test that needs it skips where peft fails on this release of transformers."""
    try:
        with peft_calls():
            return run()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
    pytest.skip(f"peft {peft.__version__} alone fails on transformers {hf.__version__}: {reason}")


def generated_by_peft(theirs: Any, **settings: Any) -> Any:
    """What peft generates; skips where it generates something else without a cache, so that it cannot tell."""

    def run() -> Any:
        found, plain = (theirs.generate(**settings, use_cache=use_cache) for use_cache in (True, False))
        if not torch.equal(found.sequences, plain.sequences):
            raise AssertionError("it generates other tokens with a cache than without")
        return found

    return ask_peft(run)


def pair(method: str, model: str) -> tuple[nn.Module, Any]:
    """Our model and peft's, in eval mode."""
    build, task = MODELS[model]
    ours = build().eval()
    name, _, kind = method.partition("-")
    return _PAIRS[name](ours, copy.deepcopy(ours), model, task, kind)


def _lora(ours: nn.Module, theirs: nn.Module, model: str, task: TaskType, kind: str) -> tuple[nn.Module, Any]:
    inject(ours, (DoRA if kind else LoRA)(r=3, alpha=5.0, modules_to_save=None, target_modules=_LORA[model]))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=_LORA[model],
        task_type=task,
        fan_in_fan_out=model == "gpt2",
        use_dora=bool(kind),
    )
    wrapped = peft.get_peft_model(theirs, config)
    layers = _layers(wrapped, peft.tuners.lora.LoraLayer)
    for path, adapter in _adapters(ours):
        layer = layers.pop(path)
        _same(adapter.lora_A, layer.lora_A["default"].weight)
        _same(adapter.lora_B, layer.lora_B["default"].weight)
        if kind:
            _same(adapter.lora_magnitude_vector, layer.lora_magnitude_vector["default"].weight)
    assert not layers
    return ours, wrapped.eval()


def _ia3(ours: nn.Module, theirs: nn.Module, model: str, task: TaskType, kind: str) -> tuple[nn.Module, Any]:
    own, other = _IA3[model]
    inject(ours, IA3(modules_to_save=None, **own))
    wrapped = peft.get_peft_model(theirs, peft.IA3Config(task_type=task, fan_in_fan_out=model == "gpt2", **other))
    layers = _layers(wrapped, peft.tuners.ia3.IA3Layer)
    for path, adapter in _adapters(ours):
        _same(adapter.ia3_l, layers.pop(path).ia3_l["default"])
    assert not layers
    return ours, wrapped.eval()


def _prefix(ours: nn.Module, theirs: nn.Module, model: str, task: TaskType, kind: str) -> tuple[nn.Module, Any]:
    projects, crosses = kind == "mlp", model == "t5"
    fields = {"num_virtual_tokens": VIRTUAL, "prefix_projection": projects, "encoder_hidden_size": HIDDEN}
    # Of an encoder-decoder model, peft reaches the decoder's attention to itself alone.
    inject(ours, PrefixTuning(modules_to_save=None, **fields, **({"places": ["decoder"]} if crosses else {})))
    wrapped = peft.get_peft_model(theirs, peft.PrefixTuningConfig(task_type=task, **fields))
    encoder = wrapped.prompt_encoder["default"]
    prefixes = [module for module in ours.modules() if isinstance(module, Prefix)]
    if projects:
        trunk = next(module for module in ours.modules() if isinstance(module, Trunk))
        _same(trunk.embedding, encoder.embedding.weight)
        _same_linear(trunk.down, encoder.transform[0])
        weight, bias = encoder.transform[2].weight, encoder.transform[2].bias
        nn.init.normal_(weight, std=0.5)
        nn.init.normal_(bias, std=0.5)
    else:
        nn.init.normal_(encoder.embedding.weight, std=0.5)
    for layer, prefix in enumerate(prefixes):
        # peft cuts T5's flat prefix as if each layer had two pairs: layer l gets pair 2l, beginning again at the end.
        place = 2 * layer % len(prefixes) if crosses else layer
        with torch.no_grad():
            if projects:
                width = prefix.up.out_features
                prefix.up.weight.copy_(weight[place * width : (place + 1) * width])
                prefix.up.bias.copy_(bias[place * width : (place + 1) * width])
            else:
                keys, values = encoder.embedding.weight.chunk(2 * len(prefixes), 1)[2 * place : 2 * place + 2]
                prefix.keys.copy_(keys)
                prefix.values.copy_(values)
    return ours, wrapped.eval()


def _prompt(ours: nn.Module, theirs: nn.Module, model: str, task: TaskType, kind: str) -> tuple[nn.Module, Any]:
    inject(ours, PromptTuning(modules_to_save=None, num_virtual_tokens=VIRTUAL))
    # Submodules: of T5, the encoder alone gets a prompt. peft's default makes one for the decoder too, and drops it.
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL, num_transformer_submodules=1)
    wrapped = peft.get_peft_model(theirs, config)
    prompt = next(module for module in ours.modules() if isinstance(module, Prompt))
    _same(prompt.embedding, wrapped.prompt_encoder["default"].embedding.weight)
    return ours, wrapped.eval()


def _p_tuning(ours: nn.Module, theirs: nn.Module, model: str, task: TaskType, kind: str) -> tuple[nn.Module, Any]:
    inject(ours, PTuning(modules_to_save=None, num_virtual_tokens=VIRTUAL, encoder=kind, encoder_hidden_size=HIDDEN))
    config = peft.PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=VIRTUAL,
        num_transformer_submodules=1,
        encoder_reparameterization_type=kind.upper(),
        encoder_hidden_size=HIDDEN,
    )
    wrapped = peft.get_peft_model(theirs, config)
    encoder = wrapped.prompt_encoder["default"]
    prompt = next(module for module in ours.modules() if isinstance(module, EncodedPrompt))
    _same(prompt.embedding, encoder.embedding.weight)
    for mine, other in zip(prompt.mlp, encoder.mlp_head, strict=True):
        if isinstance(mine, nn.Linear):
            _same_linear(mine, other)
    if prompt.lstm is not None:
        for mine, other in zip(prompt.lstm.parameters(), encoder.lstm_head.parameters(), strict=True):
            _same(mine, other)
    return ours, wrapped.eval()


_PAIRS: dict[str, Callable[..., tuple[nn.Module, Any]]] = {
    "LoRA": _lora, "IA3": _ia3, "PrefixTuning": _prefix, "PromptTuning": _prompt, "PTuning": _p_tuning
}  # fmt: skip


def _layers(wrapped: nn.Module, kind: type) -> dict[str, Any]:
    return {
        path.removeprefix("base_model.model."): layer
        for path, layer in wrapped.named_modules()
        if isinstance(layer, kind)
    }


def _adapters(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, adapter) for path, _, slots in named_slots(model) for adapter in slots.children()]


@torch.no_grad()
def _same(mine: Tensor, other: Tensor) -> None:
    """The same random values in both."""
    nn.init.normal_(mine, mean=float(mine.mean().round()), std=0.4)  # factors of IA3 stay around one
    other.copy_(mine.view_as(other))


def _same_linear(mine: nn.Linear, other: nn.Linear) -> None:
    _same(mine.weight, other.weight)
    _same(mine.bias, other.bias)
