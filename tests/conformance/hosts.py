"""Every kind of host: small networks of plain torch and of transformers, with an example of their input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial

import tiny_models
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Host:
    """One network, the layers of it that methods are pointed at, and an input."""

    name: str
    build: Callable[[], nn.Module]
    targets: tuple[str, ...]
    args: Callable[[], tuple[Tensor, ...]] = tuple
    kwargs: Callable[[], dict[str, Tensor]] = field(default=dict)
    soak: bool = False
    """True if only ``make soak`` runs the contract on it."""
    compiled: bool = False
    """True if ``make test`` compiles it, which takes seconds: the others wait for ``make soak``."""
    cannot_hold: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Items of the contract that the network cannot hold without any adapter, by the names of their tests, and why."""

    @cache  # noqa: B019 - the hosts live as long as the test run
    def network(self) -> nn.Module:
        """The network with random weights, the same for every test. Copy it before use."""
        torch.manual_seed(1)
        network = self.build()
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):  # torch and transformers start many biases at zero: wrong ones would go unseen
                nn.init.normal_(parameter, std=0.2)
        return network

    @cache  # noqa: B019
    def example(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Positional and keyword arguments for :meth:`network`."""
        torch.manual_seed(2)
        return self.args(), self.kwargs()


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(9, 12), nn.Linear(12, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class BagOfTokens(nn.Module):
    """An embedding with a padding entry."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 9, padding_idx=0), nn.Linear(9, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh().mean(1))


class Dense(nn.Linear):
    """A linear layer with its activation inside, as schnetpack has it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).tanh()


class Standardized(nn.Conv1d):
    """A convolution with a kernel of mean zero, as BiT has it."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2), keepdim=True), self.bias)


class Offset(nn.Embedding):
    """Positions behind some reserved ones, as BART has them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[1], device=x.device).expand(x.shape) + 2)


class Router(nn.Linear):
    """A linear layer that puts out two things, as Llama 4 has it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits.sigmoid(), logits


class OwnForwards(nn.Module):
    """Layers that compute something of their own with their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(11, 9), Offset(9, 9)
        self.dense, self.conv, self.router = Dense(9, 12), Standardized(12, 8, 3), Router(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.dense(self.table(ids) + self.places(ids))
        return self.router(self.conv(h.transpose(1, 2)).transpose(1, 2))[0]


class ReadLayers(nn.Module):
    """Reads weights of layers below: of one that it calls too, as Whisper its embedding, and of others alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.layers, self.kernel = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.table(ids)).transpose(1, 2)
        h = nn.functional.conv1d(h, self.kernel.weight, self.kernel.bias, padding=1).tanh().transpose(1, 2)
        for i in range(2):  # the cosine of each feature with its weights
            h = nn.functional.linear(h, nn.functional.normalize(self.layers[i].weight), self.layers[i].bias)
        return h @ self.table.weight.T


class Convolution(nn.Module):
    """One convolution, and a head that reads its mean."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.head = conv, nn.Linear(conv.out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).tanh().flatten(2).mean(2))


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        for norm in (self.norm1, self.norm2):  # as after some training, not 0 and 1
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.head(self.norm2(self.conv2(x)).relu().flatten(2).mean(2))


class RecurrentClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(11, 6), nn.LSTM(6, 9, batch_first=True), nn.Linear(9, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(ids))[0][:, -1])


class CrossAttention(nn.Module):
    """Keys and values of other widths than the query's: three weights in place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, kdim=9, vdim=10, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value, need_weights=False)[0]


def _tokens(entries: int, *shape: int) -> Tensor:
    return torch.randint(1, entries, shape)


def _text() -> dict[str, Tensor]:
    ids = _tokens(tiny_models.VOCABULARY, 2, 5)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _seq2seq() -> dict[str, Tensor]:
    return {**_text(), "decoder_input_ids": _tokens(tiny_models.VOCABULARY, 2, 4)}


def _same(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    def query_key_value() -> tuple[Tensor, ...]:
        x = torch.randn(shape)
        return x, x, x

    return query_key_value


def _conv(name: str, conv: Callable[[], nn.Module], *shape: int, soak: bool = True) -> Host:
    return Host(name, lambda: Convolution(conv()), ("conv",), lambda: (torch.randn(shape),), soak=soak)


_ATTENTION = ("in_proj", "out_proj")
_BERT = ("query", "key", "value", "dense")
_LAYER = ("in_proj", "out_proj", "linear1", "linear2")
_ENCODER = {"d_model": 12, "nhead": 2, "dim_feedforward": 17, "batch_first": True}

HOSTS = [
    Host("linear", MLP, ("fc1", "fc2"), lambda: (torch.randn(5, 4, 9),), compiled=True),
    Host("hf_conv1d", tiny_models.gpt2, ("c_attn", "c_fc", "c_proj"), kwargs=_text, soak=True),
    Host("embedding", BagOfTokens, ("table",), lambda: (torch.tensor([[1, 2, 2, 10], [3, 1, 0, 0]]),)),
    _conv("conv1d", lambda: nn.Conv1d(4, 9, 3, stride=2, padding=1, dilation=2), 3, 4, 11),
    _conv(
        "conv2d",
        lambda: nn.Conv2d(3, 9, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        *(3, 3, 8, 7),
        soak=False,
    ),
    _conv("conv2d_groups", lambda: nn.Conv2d(8, 10, 3, padding=2, dilation=2, groups=2), 3, 8, 6, 7),
    _conv("conv2d_depthwise", lambda: nn.Conv2d(8, 16, 3, stride=2, padding="valid", groups=8), 3, 8, 6, 7),
    _conv("conv2d_reflect", lambda: nn.Conv2d(3, 9, 3, padding=(1, 2), padding_mode="reflect"), 3, 3, 6, 7),
    _conv("conv3d", lambda: nn.Conv3d(2, 9, 2, padding="same", padding_mode="circular"), 2, 2, 4, 3, 5),
    Host("attention", lambda: nn.MultiheadAttention(12, 3), _ATTENTION, _same(5, 2, 12)),
    Host(
        "attention_batch_first",
        lambda: nn.MultiheadAttention(12, 3, batch_first=True),
        _ATTENTION,
        _same(2, 5, 12),
        soak=True,
    ),
    Host(
        "attention_kdim",
        CrossAttention,
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        lambda: (torch.randn(2, 5, 12), torch.randn(2, 4, 9), torch.randn(2, 4, 10)),
        soak=True,
    ),
    Host(
        "encoder_layer",
        lambda: nn.TransformerEncoderLayer(**_ENCODER),
        _LAYER,
        lambda: (torch.randn(2, 5, 12),),
        soak=True,
    ),
    Host(
        "encoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**_ENCODER), 2),
        _LAYER,
        lambda: (torch.randn(2, 5, 12),),
        soak=True,
    ),
    Host(
        "decoder_layer",
        lambda: nn.TransformerDecoderLayer(**_ENCODER),
        _LAYER,
        lambda: (torch.randn(2, 5, 12), torch.randn(2, 4, 12)),
        soak=True,
    ),
    Host("own_forwards", OwnForwards, ("dense", "conv", "router", "places"), lambda: (_tokens(11, 3, 5),)),
    Host("read_layers", ReadLayers, ("table", "kernel", "layers.0", "layers.1"), lambda: (_tokens(11, 3, 5),)),
    Host("bert", tiny_models.bert, _BERT, kwargs=_text),
    Host(
        "bert_one_layer", partial(tiny_models.bert, num_hidden_layers=1), _BERT, kwargs=_text, soak=True, compiled=True
    ),
    Host("llama", tiny_models.llama, ("attention", "ffn"), kwargs=_text),
    Host(
        "mamba",
        tiny_models.mamba,
        ("x_proj", "dt_proj", "conv1d", "out_proj"),
        kwargs=_text,
        soak=True,
        cannot_hold={
            "test_a_compiled_model_gives_the_same_output_and_gradients": "transformers' own code warns when compiled",
            **dict.fromkeys(
                (
                    "test_adapters_stay_in_full_precision_beside_a_bf16_base",
                    "test_an_adapter_injected_into_a_bf16_base_trains_in_full_precision",
                    "test_beside_an_fp64_base_everything_is_fp64",
                    "test_a_model_cast_to_fp64_computes_what_it_did",
                ),
                "its output is fp32 whatever it computes in",
            ),
        },
    ),
    Host("gemma3", tiny_models.gemma3, ("embed_tokens", "v_proj"), kwargs=_text, soak=True),
    Host("bart", tiny_models.bart, ("embed_positions", "v_proj"), kwargs=_seq2seq, soak=True),
    Host("cnn", CNN, ("conv1", "conv2"), lambda: (torch.randn(4, 3, 6, 7),), soak=True),
    Host("lstm", RecurrentClassifier, ("head",), lambda: (_tokens(11, 3, 5),), soak=True),
]
