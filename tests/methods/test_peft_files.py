"""Adapter directories that cross between this library and the peft package: the outputs stay what they were."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers as hf
from methods.peft_pairs import ask_peft, peft_calls
from peft import TaskType
from snapshot import Snapshot
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    DoRA,
    LayerNormTuning,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    PTuning,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.errors import CheckpointError

pytestmark = [
    pytest.mark.compat,
    # peft asks transformers a question by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
    # It saves the table along with an adapter on it, and says so.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    # What it says of every norm.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

MODELS: dict[str, tuple[Callable[[], nn.Module], TaskType | None]] = {
    "bert": (tiny_models.bert, TaskType.SEQ_CLS),
    "gpt2": (tiny_models.gpt2, TaskType.CAUSAL_LM),
    "llama": (tiny_models.llama, TaskType.CAUSAL_LM),
    "t5": (tiny_models.t5, TaskType.SEQ_2_SEQ_LM),
    "vit": (tiny_models.vit, None),
}
LINEARS = {
    "bert": ["query", "value", "output.dense"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "down_proj"],
    "t5": ["q", "wi_0", "wo"],
    "vit": ["q_proj", "fc1"],
}
OTHERS = {
    "bert": "word_embeddings",
    "gpt2": "wte",
    "llama": "embed_tokens",
    "t5": "relative_attention_bias",
    "vit": "projection",
}
NORMS = {
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_f"],
    "llama": ["input_layernorm", "norm"],
    "t5": ["layer_norm"],
    "vit": ["layernorm_before"],
}
# The layers whose input IA3 scales, beside others whose output it scales.
FEEDFORWARD = {"bert": "output.dense", "gpt2": "c_fc", "llama": "down_proj", "t5": "wo", "vit": "fc1"}
PROMPTS = {"num_virtual_tokens": 3}

Base = nn.Module


def _base(model: str) -> Base:
    base = MODELS[model][0]().eval()
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return base


def _batch(model: str) -> dict[str, Tensor]:
    """Rows of two lengths."""
    if model == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 5))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if model == "bert":
        batch["token_type_ids"] = torch.tensor([[0, 0, 1, 1, 1]] * 2)
    return {**batch, "labels": ids.masked_fill(mask == 0, -100)} if model == "t5" else batch


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch).logits
    return logits[:, -batch["input_ids"].shape[1] :] if logits.dim() == 3 else logits  # peft leaves its prompt in


@torch.no_grad()
def _move(model: nn.Module, only: str = "") -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and only in name:
            parameter.add_(0.3 * torch.randn_like(parameter))


def _ours(method: str, model: str) -> Method:
    targets, text = LINEARS[model], model != "vit"
    methods: dict[str, Callable[[], Method]] = {
        "LoRA": lambda: LoRA(r=3, alpha=5, dropout=0.1, target_modules=targets),
        "DoRA": lambda: DoRA(r=3, alpha=5, dropout=0.1, target_modules=targets),
        "DoRA-patterns": lambda: DoRA(
            r=4, target_modules=[OTHERS[model], *targets], rank_pattern={targets[0]: 2}, alpha_pattern={r".*\.1\..*": 3}
        ),
        "LoRA-rslora": lambda: LoRA(r=3, alpha=5.5, use_rslora=True, target_modules=targets),
        "LoRA-patterns": lambda: LoRA(
            r=4, target_modules=targets, rank_pattern={targets[0]: 2}, alpha_pattern={r".*\.1\..*": 3}
        ),
        "LoRA-other": lambda: LoRA(r=2, target_modules=[OTHERS[model], targets[0]]),
        "LoRA-alone": lambda: LoRA(r=3, target_modules=targets, modules_to_save=None),
        "IA3": IA3,
        "IA3-named": lambda: IA3(target_modules=targets, feedforward_modules=[FEEDFORWARD[model]]),
        "LayerNorm": LayerNormTuning,
        "Prompt": lambda: PromptTuning(**PROMPTS),
        "Prompt-alone": lambda: PromptTuning(**PROMPTS, modules_to_save=None),
        "PTuning-mlp": lambda: PTuning(**PROMPTS),
        "PTuning-lstm": lambda: PTuning(**PROMPTS, encoder="lstm", encoder_dropout=0.1),
        "Prefix": lambda: PrefixTuning(**PROMPTS, places=["decoder"], init_std=0.5),
        "Prefix-mlp": lambda: PrefixTuning(**PROMPTS, places=["decoder"], prefix_projection=True),
    }
    assert text or not method.startswith("P")
    return methods[method]()


def _theirs(method: str, model: str) -> peft.PeftConfig:
    targets, shared = LINEARS[model], {"task_type": MODELS[model][1]}
    lora = {**shared, "r": 3, "lora_alpha": 5, "fan_in_fan_out": model == "gpt2", "target_modules": targets}
    if model == "vit":
        lora["modules_to_save"] = ["classifier"]
    configs: dict[str, Callable[[], peft.PeftConfig]] = {
        "LoRA": lambda: peft.LoraConfig(**lora),
        "DoRA": lambda: peft.LoraConfig(**lora, use_dora=True),
        "DoRA-patterns": lambda: peft.LoraConfig(
            **{**lora, "target_modules": [OTHERS[model], *targets]}, rank_pattern={targets[0]: 2}, use_dora=True
        ),
        "LoRA-rslora": lambda: peft.LoraConfig(**lora, use_rslora=True, init_lora_weights="gaussian"),
        "LoRA-patterns": lambda: peft.LoraConfig(
            **lora, rank_pattern={targets[0]: 2}, alpha_pattern={r".*\.1\..*": 3, rf"^.*{targets[1]}": 7}
        ),
        "LoRA-other": lambda: peft.LoraConfig(**{**lora, "target_modules": [OTHERS[model], targets[0]]}),
        "LoRA-regex": lambda: peft.LoraConfig(**{**lora, "target_modules": rf".*\.1\..*({'|'.join(targets)})"}),
        "LoRA-layers": lambda: peft.LoraConfig(**lora, layers_to_transform=[1]),
        "LoRA-all": lambda: peft.LoraConfig(**{**lora, "target_modules": "all-linear"}),
        "IA3": lambda: peft.IA3Config(
            **shared,
            modules_to_save=lora.get("modules_to_save"),
            target_modules=targets,
            feedforward_modules=[FEEDFORWARD[model]],
            fan_in_fan_out=model == "gpt2",
        ),
        "LayerNorm": lambda: peft.LNTuningConfig(
            **shared, target_modules=NORMS[model], modules_to_save=lora.get("modules_to_save")
        ),
        "Prompt": lambda: peft.PromptTuningConfig(**shared, **PROMPTS),
        "PTuning-mlp": lambda: peft.PromptEncoderConfig(**shared, **PROMPTS),
        "PTuning-lstm": lambda: peft.PromptEncoderConfig(
            **shared, **PROMPTS, encoder_reparameterization_type="LSTM", encoder_hidden_size=7
        ),
        "Prefix": lambda: peft.PrefixTuningConfig(**shared, **PROMPTS),
        "Prefix-mlp": lambda: peft.PrefixTuningConfig(**shared, **PROMPTS, prefix_projection=True),
    }
    return configs[method]()


LAYERS = [
    "LoRA",
    "DoRA",
    "DoRA-patterns",
    "LoRA-rslora",
    "LoRA-patterns",
    "LoRA-other",
    "LoRA-alone",
    "IA3",
    "IA3-named",
    "LayerNorm",
]
TOKENS = ["Prompt", "Prompt-alone", "PTuning-mlp", "PTuning-lstm", "Prefix", "Prefix-mlp"]
OURS = [(method, model) for model in MODELS for method in LAYERS + (TOKENS if model != "vit" else [])]
THEIR_LAYERS = [m for m in LAYERS if m not in ("LoRA-alone", "IA3-named")] + ["LoRA-regex", "LoRA-layers", "LoRA-all"]
THEIRS = [
    (method, model)
    for model in MODELS
    for method in THEIR_LAYERS + ([m for m in TOKENS if "alone" not in m] if model != "vit" else [])
]


def _check_peft(method: str, model: str, base: Base, batch: dict[str, Tensor]) -> None:
    """Skip where peft's own adapter of this kind does not run."""
    if method in TOKENS and "alone" not in method:
        ask_peft(lambda: _logits(peft.get_peft_model(copy.deepcopy(base), _theirs(method, model)), batch))


def load_with_peft(base: Base, path: Path) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), path).eval()


@pytest.mark.parametrize(("method", "model"), OURS)
def test_peft_computes_the_same_with_what_was_saved_here(method: str, model: str, tmp_path: Path) -> None:
    base, batch = _base(model), _batch(model)
    trained = copy.deepcopy(base)
    inject(trained, _ours(method, model))
    _move(trained)
    save_adapter(trained, tmp_path)
    expected = _logits(trained, batch)
    assert not torch.allclose(expected, _logits(base, batch), atol=1e-3)
    _check_peft(method, model, base, batch)
    with peft_calls():
        found = _logits(load_with_peft(base, tmp_path), batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "model"), THEIRS)
def test_what_peft_saved_computes_the_same_here(method: str, model: str, tmp_path: Path) -> None:
    base, batch = _base(model), _batch(model)
    trained = peft.get_peft_model(copy.deepcopy(base), _theirs(method, model))
    _move(trained)
    trained.eval().save_pretrained(tmp_path)
    expected = ask_peft(lambda: _logits(load_with_peft(base, tmp_path), batch))
    assert not torch.allclose(expected, _logits(base, batch), atol=1e-3)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(_logits(base, batch), expected, rtol=1e-5, atol=1e-5)


CROSSING: dict[str, dict[str, int]] = {
    "as many": {},
    "three": {"num_layers": 3},
    "one": {"num_layers": 1},
    "fewer below": {"num_decoder_layers": 1},
}


@pytest.mark.parametrize("layers", CROSSING)
def test_a_prefix_of_an_encoder_decoder_model_has_its_place_whatever_the_layers(layers: str, tmp_path: Path) -> None:
    """peft gives layer l the pair 2l of its flat prefix, beginning again at the end."""
    base, batch = tiny_models.t5(**CROSSING[layers]).eval(), _batch("t5")
    trained = copy.deepcopy(base)
    inject(trained, _ours("Prefix", "t5"))
    save_adapter(trained, tmp_path / "ours")
    expected = _logits(trained, batch)
    _check_peft("Prefix", "t5", base, batch)
    with peft_calls():
        found = _logits(load_with_peft(base, tmp_path / "ours"), batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other = peft.get_peft_model(copy.deepcopy(base), _theirs("Prefix", "t5"))
    _move(other)
    other.eval().save_pretrained(tmp_path / "theirs")
    load_adapter(base, tmp_path / "theirs")
    torch.testing.assert_close(_logits(base, batch), ask_peft(lambda: _logits(other, batch)), rtol=1e-5, atol=1e-5)


HEADS: dict[str, tuple[Callable[[], nn.Module], TaskType]] = {
    "sequence": (lambda: tiny_models.roberta(), TaskType.SEQ_CLS),
    "two layers": (lambda: tiny_models.distilbert(), TaskType.SEQ_CLS),
    "score": (lambda: tiny_models.llama(hf.LlamaForSequenceClassification), TaskType.SEQ_CLS),
    "tokens": (lambda: tiny_models.bert(hf.BertForTokenClassification), TaskType.TOKEN_CLS),
    "features": (lambda: tiny_models.bert(hf.BertModel), TaskType.FEATURE_EXTRACTION),
    "masked": (lambda: tiny_models.bert(hf.BertForMaskedLM), TaskType.FEATURE_EXTRACTION),
}


WITH_HEADS = {
    "LoRA": LoRA(r=2),
    "LoRA without the head": LoRA(r=2, modules_to_save=None),
    "prompt": PromptTuning(**PROMPTS),
}


def _first(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch)[0][:, -1:]


@pytest.mark.parametrize("method", WITH_HEADS)
@pytest.mark.parametrize("head", HEADS)
def test_whatever_head_a_model_has(head: str, method: str, tmp_path: Path) -> None:
    base, task, own = HEADS[head][0]().eval(), HEADS[head][1], WITH_HEADS[method]
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    trained = copy.deepcopy(base)
    inject(trained, replace(own, modules_to_save=["classifier"]) if head == "two layers" else own)
    _move(trained)
    save_adapter(trained, tmp_path / "ours")
    torch.testing.assert_close(
        _first(load_with_peft(base, tmp_path / "ours"), batch), _first(trained, batch), rtol=1e-5, atol=1e-5
    )
    config = (
        peft.PromptTuningConfig(task_type=task, **PROMPTS, token_dim=16, num_layers=2, num_attention_heads=2)
        if isinstance(own, PromptTuning)
        else peft.LoraConfig(task_type=task, target_modules=r".*(query|q_lin|q_proj)")
    )
    other = peft.get_peft_model(copy.deepcopy(base), config)
    _move(other)
    other.eval().save_pretrained(tmp_path / "theirs")
    load_adapter(base, tmp_path / "theirs")
    torch.testing.assert_close(_first(base, batch), _first(other, batch), rtol=1e-5, atol=1e-5)


class Around(nn.Module):
    """peft wants the adapted layer below a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Tensor:
        output = self.layer(*args)
        return output if isinstance(output, Tensor) else output[0]


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(3, 7, 3, 2, 1), (2, 3, 9)),
    "2d": (lambda: nn.Conv2d(3, 7, (3, 2), (2, 1), (1, 2)), (2, 3, 8, 7)),
    "3d": (lambda: nn.Conv3d(3, 7, 2), (2, 3, 4, 4, 4)),
}
OUR_OWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dilated": (lambda: nn.Conv2d(3, 7, 3, dilation=2), (2, 3, 8, 7)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 8, 7)),
    "reflecting": (lambda: nn.Conv2d(3, 7, 3, padding=1, padding_mode="reflect"), (2, 3, 8, 7)),
}


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, *OUR_OWN])
@pytest.mark.parametrize("method", ["LoRA", "IA3"])
def test_convolutions_that_peft_computes_alike(method: str, kind: str, tmp_path: Path) -> None:
    build, shape = {**CONVOLUTIONS, **OUR_OWN}[kind]
    base, x = Around(build()).eval(), torch.randn(shape)
    trained = copy.deepcopy(base)
    inject(trained, LoRA(r=2, target_modules=["layer"]) if method == "LoRA" else IA3(target_modules=["layer"]))
    _move(trained)
    save_adapter(trained, tmp_path)
    if (kind in OUR_OWN and method == "LoRA") or (kind == "1d" and method == "IA3"):
        with pytest.raises(KeyError, match=rf"lightning_peft\.{method}"):
            load_with_peft(base, tmp_path)
    else:
        torch.testing.assert_close(load_with_peft(base, tmp_path)(x), trained(x), rtol=1e-5, atol=1e-5)
    load_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), trained(x))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("kind", [*OUR_OWN, "attention"])
def test_what_peft_computes_in_another_way_is_refused(kind: str, tmp_path: Path) -> None:
    base = Around(OUR_OWN[kind][0]() if kind in OUR_OWN else nn.MultiheadAttention(8, 2))
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["layer"])).save_pretrained(tmp_path)
    before = Snapshot(base)
    with pytest.raises(CheckpointError):
        load_adapter(base, tmp_path)
    before.assert_same(base)


def test_an_adapter_of_another_name_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    base = tiny_models.bert()
    wrapped = peft.get_peft_model(copy.deepcopy(base), _theirs("LoRA", "bert"), adapter_name="film")
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="some below it: 'film'"):
        load_adapter(base, tmp_path)
    load_adapter(base, tmp_path / "film", "film")


def test_peft_goes_on_training_from_what_was_saved_here(tmp_path: Path) -> None:
    base = tiny_models.bert()
    trained = copy.deepcopy(base)
    inject(trained, LoRA(r=2))
    save_adapter(trained, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    wrapped(**_batch("bert"), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    ours, theirs = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (trained, wrapped))
    assert ours == theirs


def test_more_layers_than_peft_searches_one_by_one(tmp_path: Path) -> None:
    """From twenty names on, peft looks for shorter ones that mean the same."""
    base, batch = tiny_models.bert(num_hidden_layers=12).eval(), _batch("bert")
    trained = copy.deepcopy(base)
    inject(trained, LoRA(r=2, target_modules=["attention", "output.dense"], layers=[0, 1, 3, 7, 10, 11]))
    _move(trained)
    save_adapter(trained, tmp_path)
    torch.testing.assert_close(
        _logits(load_with_peft(base, tmp_path), batch), _logits(trained, batch), rtol=1e-5, atol=1e-5
    )
