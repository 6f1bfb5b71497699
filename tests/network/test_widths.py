"""How many features a module puts out, and in which dimension."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft import LoRA, inject
from lightning_peft.network.calls import first_output
from lightning_peft.network.norms import Width, width_of


class Block(nn.Module):
    """A residual block of a CNN whose path beside the convolutions is defined last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.beside = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())) + self.beside(x)


class Scaled(nn.Module):
    """Parameters of its own behind its last layer, which say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 6), nn.Parameter(torch.ones(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _ids() -> Tensor:
    return torch.tensor([[1, 2, 0]])


def _random(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


MODULES: dict[str, tuple[Callable[[], Any], Callable[[], Tensor], Width]] = {
    "linear": (lambda: nn.Linear(4, 6), _random(2, 3, 4), Width(6, -1)),
    "hf_conv1d": (lambda: Conv1D(6, 4), _random(2, 3, 4), Width(6, -1)),
    "embedding": (lambda: nn.Embedding(4, 6), _ids, Width(6, -1)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 2), _random(2, 4, 5), Width(6, 1)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 2, groups=2), _random(2, 4, 5, 7), Width(6, 1)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), _random(2, 4, 5, 7, 3), Width(6, 1)),
    "lstm": (lambda: nn.LSTM(4, 6, 2), _random(5, 2, 4), Width(6, -1)),
    "lstm_projected": (lambda: nn.LSTM(4, 6, proj_size=3), _random(5, 2, 4), Width(3, -1)),
    "gru_both_ways": (lambda: nn.GRU(4, 6, bidirectional=True, batch_first=True), _random(2, 5, 4), Width(12, -1)),
    "rnn": (lambda: nn.RNN(4, 6), _random(5, 2, 4), Width(6, -1)),
    "layer_norm": (lambda: nn.LayerNorm(6), _random(2, 3, 6), Width(6, -1)),
    "rms_norm": (lambda: nn.RMSNorm(6), _random(2, 3, 6), Width(6, -1)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(6), _random(3, 6), Width(6, 1)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(6), _random(2, 6, 4, 5), Width(6, 1)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), _random(2, 6, 4, 5), Width(6, 1)),
    "instance_norm": (lambda: nn.InstanceNorm2d(6, affine=True), _random(2, 6, 4, 5), Width(6, 1)),
    "cnn_block": (Block, _random(2, 4, 5, 5), Width(8, 1)),
    "own_parameters": (Scaled, _random(2, 4), Width(6, -1)),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(8, 2, 12), _random(5, 2, 8), Width(8, -1)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2),
        _random(2, 5, 8),
        Width(8, -1),
    ),
    "bert_block": (lambda: tiny_models.bert().bert.encoder.layer[0], _random(2, 5, 16), Width(16, -1)),
    "gpt2_block": (lambda: tiny_models.gpt2().transformer.h[0], _random(2, 5, 16), Width(16, -1)),
    "t5_block": (lambda: tiny_models.t5().encoder.block[0], _random(2, 5, 16), Width(16, -1)),
    "vit_mlp": (lambda: tiny_models.vit().vit.layers[0].mlp, _random(2, 5, 16), Width(16, -1)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_the_width_is_that_of_the_output(name: str) -> None:
    build, example, expected = MODULES[name]
    module = build().eval()
    assert width_of(module) == expected
    assert first_output(module(example())).shape[expected.dim] == expected.features


def test_an_attention_is_as_wide_as_its_query() -> None:
    assert width_of(nn.MultiheadAttention(8, 2, kdim=5, vdim=7)) == Width(8, -1)


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.Dropout(),
        nn.BatchNorm2d(4, affine=False),
        nn.ConvTranspose2d(3, 4, 2),
        nn.LSTMCell(3, 4),
        nn.PReLU(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_where_nothing_tells_the_width_there_is_none(module: nn.Module) -> None:
    assert width_of(module) is None


def test_an_adapter_inside_is_no_part_of_a_module() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    inject(model, LoRA(r=2, target_modules=["0"]))
    assert width_of(model) == width_of(model[0]) == Width(6, -1)
