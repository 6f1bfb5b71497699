"""The models that are measured, with random weights, and what a training step of each is fed with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model, one batch."""

    name: str
    build: Callable[[], nn.Module]
    batch: tuple[int, int]
    """Rows and tokens of each."""
    dtype: torch.dtype = torch.float32
    r: int = 8
    dropout: float = 0.0
    device: str = "cpu"
    labels: int = 0
    """Classes of a classification; 0 for a language model, whose labels are its input."""
    method: str = "LoRA"
    """What is trained, by us and by peft (or, what peft does not have, in plain torch)."""
    quick: bool = False
    """Whether ``--quick`` measures it."""
    steps: int = 10
    """Steps of each variant."""

    def model(self, device: str) -> nn.Module:
        """A new model in train mode, the same at each call."""
        torch.manual_seed(0)
        with torch.device(device):
            return self.build().to(self.dtype).train()

    def example(self, model: nn.Module, device: str) -> Mapping[str, Tensor]:
        """What the model is called with; the same at each call."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(10, model.config.vocab_size, self.batch, generator=generator).to(device)
        labels = torch.arange(self.batch[0], device=device) % self.labels if self.labels else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _llama(width: int, layers: int, ffn: int, heads: int, kv: int, vocabulary: int) -> Callable[[], nn.Module]:
    config = hf.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return lambda: hf.LlamaForCausalLM(config)


def _minilm() -> nn.Module:
    config = hf.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    return hf.BertForSequenceClassification(config)


_D512 = _llama(512, 6, 1376, 8, 8, 4096)
_SMALL = _llama(512, 1, 1376, 8, 8, 512)  # for processors without arithmetic in bf16, a hundred times slower in it
_SMOLLM2 = _llama(576, 30, 1536, 9, 3, 49152)
_LLAMA_1B = _llama(2048, 16, 8192, 32, 8, 128256)
_BF16 = torch.bfloat16

SHAPES = (
    Shape(name="llama-d512", build=_D512, batch=(4, 256), quick=True),
    Shape(name="llama-d512-dora", build=_D512, batch=(4, 256), method="DoRA", quick=True),
    Shape(name="llama-d512-dora-dropout", build=_D512, batch=(4, 256), dropout=0.1, method="DoRA"),
    Shape(name="llama-d512-ia3", build=_D512, batch=(4, 256), method="IA3"),
    Shape(name="llama-d512-prefix", build=_D512, batch=(4, 256), method="PrefixTuning"),
    Shape(name="llama-d512-bottleneck", build=_D512, batch=(4, 256), method="BottleneckAdapter"),
    Shape(name="llama-d512-dropout", build=_D512, batch=(4, 256), dropout=0.1),
    Shape(name="llama-d512-bf16", build=_D512, batch=(4, 256), dtype=_BF16),
    Shape(name="llama-d512-bf16-dropout", build=_D512, batch=(4, 256), dtype=_BF16, dropout=0.1),
    Shape(name="llama-d512-x1-bf16", build=_SMALL, batch=(1, 128), dtype=_BF16),
    Shape(name="llama-d512-x1-bf16-dropout", build=_SMALL, batch=(1, 128), dtype=_BF16, dropout=0.1),
    Shape(name="smollm2-135m", build=_SMOLLM2, batch=(4, 256), steps=3),
    Shape(name="smollm2-135m-bf16", build=_SMOLLM2, batch=(4, 256), dtype=_BF16, steps=3),
    Shape(name="minilm", build=_minilm, batch=(16, 48), labels=2, quick=True, steps=15),
    Shape(name="minilm-dropout", build=_minilm, batch=(16, 48), labels=2, dropout=0.1, steps=15),
    Shape(name="llama-1b", build=_LLAMA_1B, batch=(4, 2048), dtype=_BF16, r=16, device="cuda", quick=True, steps=15),
    Shape(
        name="llama-1b-dropout",
        build=_LLAMA_1B,
        batch=(4, 2048),
        dtype=_BF16,
        r=16,
        dropout=0.1,
        device="cuda",
        steps=15,
    ),
)
