"""Every kind of model: its network, a batch of its data, and a LightningModule around both that a user could have."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import lightning as L
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
ROWS, LENGTH = 4, 6


@dataclass(frozen=True)
class Model:
    """One network with a task."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    """Arguments of the network, its ``labels`` among them, or a ``target`` where it computes no loss itself."""
    targets: tuple[str, ...]
    """Layers for methods that find none by themselves, or leave the choice to the user."""
    head: str | None = None
    """What is fully trained where nothing tells a method which layer is new: in a network of plain torch."""
    soak: bool = True
    """True if only ``make soak`` trains the methods on it."""

    @cache  # noqa: B019 - the models live as long as the test run
    def _network(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            network = self.build()
            for name, parameter in network.named_parameters():
                if name.endswith("bias"):  # torch and transformers start many at zero: wrong ones would go unseen
                    nn.init.normal_(parameter, std=0.2)
        return network

    def network(self) -> nn.Module:
        """The pretrained network: the same random weights each time, whatever the seed is."""
        return copy.deepcopy(self._network())

    @cache  # noqa: B019
    def example(self) -> Batch:
        """The one batch that is trained on."""
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return self.batch()


class Task(L.LightningModule):
    """An untouched LightningModule around the network of one entry of :data:`MODELS`."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = MODELS[model].network()

    def forward(self, batch: Batch) -> Any:
        return self.network(**{key: value for key, value in batch.items() if key != "target"})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output = self(batch)
        if isinstance(output, Tensor):
            return F.cross_entropy(output, batch["target"])
        return F.mse_loss(output.pooler_output, batch["target"]) if "target" in batch else output.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx), batch_size=ROWS)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output = self(batch)
        if isinstance(output, Tensor):
            return output
        return output.pooler_output if "target" in batch else output.logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Without decay, what gets no gradient stays where it is.
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(9, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x).relu()).relu())


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 3)
        for norm in (self.norm1, self.norm2):  # as after some training, not 0 and 1
            nn.init.normal_(norm.running_mean, std=0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.head(self.norm2(self.conv2(x)).relu().flatten(2).mean(2))


class Encoder(nn.Module):
    """Torch's encoder, or one layer of it, over embedded tokens of which some are padding."""

    def __init__(self, layers: int | None) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 17, batch_first=True)
        self.table, self.head = nn.Embedding(11, 12, padding_idx=0), nn.Linear(12, 3)
        self.encoder = nn.TransformerEncoder(layer, layers) if layers else layer

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(ids), src_key_padding_mask=ids == 0)[:, 0])


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.head = nn.Transformer(12, 2, 1, 1, 17, batch_first=True), nn.Linear(12, 3)

    def forward(self, source: Tensor, goal: Tensor) -> Tensor:
        return self.head(self.transformer(source, goal).mean(1))


class RecurrentClassifier(nn.Module):
    def __init__(self, cell: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.table, self.rnn, self.head = nn.Embedding(11, 6), cell(6, 9, batch_first=True), nn.Linear(9, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(ids))[0][:, -1])


def _tokens(entries: int = tiny_models.VOCABULARY) -> Tensor:
    """Rows of tokens; the last row ends in padding."""
    ids = torch.randint(3, entries, (ROWS, LENGTH))
    ids[-1, -2:] = 0
    return ids


def _text() -> Batch:
    ids = _tokens()
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _classes() -> Tensor:
    return torch.arange(ROWS) % 3


def _classified(inputs: Callable[[], Batch]) -> Batch:
    return {**inputs(), "labels": _classes()}


def _continued() -> Batch:
    text = _text()
    return {**text, "labels": text["input_ids"].masked_fill(text["input_ids"] == 0, -100)}


def _translated(inputs: Callable[[], Batch]) -> Batch:
    goal = _tokens()[:, 1:]
    return {**inputs(), "labels": goal.masked_fill(goal == 0, -100)}


def _random(**shapes: tuple[int, ...]) -> Batch:
    return {name: torch.randn(ROWS, *shape) for name, shape in shapes.items()}


def _labelled(**shapes: tuple[int, ...]) -> Batch:
    return {**_random(**shapes), "target": _classes()}


def _labelled_tokens() -> Batch:
    return {"ids": _tokens(11), "target": _classes()}


_CLASSES = partial(_classified, _text)
_QV = ("q_proj", "v_proj")
_LAYER = ("linear1", "linear2")

_ENTRIES = [
    Model("BERT", partial(tiny_models.bert, num_labels=3), _CLASSES, ("query", "value"), soak=False),
    Model("RoBERTa", partial(tiny_models.roberta, num_labels=3), _CLASSES, ("query", "value")),
    Model("DistilBERT", partial(tiny_models.distilbert, num_labels=3), _CLASSES, ("q_lin", "v_lin")),
    Model("DeBERTa-v2", partial(tiny_models.deberta, num_labels=3), _CLASSES, ("query_proj", "value_proj")),
    Model("GPT-2", tiny_models.gpt2, _continued, ("c_attn",)),
    Model("Llama (GQA)", tiny_models.llama, _continued, _QV, soak=False),
    Model("Qwen3", tiny_models.qwen3, _continued, _QV),
    Model("Gemma-3 (text)", tiny_models.gemma3, _continued, _QV),
    Model("Mistral", tiny_models.mistral, _continued, _QV),
    Model("T5", tiny_models.t5, partial(_translated, _text), ("q", "v"), soak=False),
    Model("BART", tiny_models.bart, partial(_translated, _text), _QV),
    Model(
        "ViT",
        partial(tiny_models.vit, num_labels=3),
        partial(_classified, partial(_random, pixel_values=(3, 8, 8))),
        _QV,
    ),
    Model("Whisper", tiny_models.whisper, partial(_translated, partial(_random, input_features=(8, 16))), _QV),
    Model("CLIP text", tiny_models.clip_text, lambda: {**_text(), **_random(target=(tiny_models.WIDTH,))}, _QV),
    Model("MLP", MLP, partial(_labelled, x=(9,)), ("fc1",), "head"),
    Model("CNN (BatchNorm, groups)", CNN, partial(_labelled, x=(3, 7, 6)), ("conv1", "conv2"), "head"),
    Model("nn.TransformerEncoderLayer", partial(Encoder, None), _labelled_tokens, _LAYER, "head"),
    Model("nn.TransformerEncoder", partial(Encoder, 2), _labelled_tokens, _LAYER, "head"),
    Model("nn.Transformer", EncoderDecoder, partial(_labelled, source=(5, 12), goal=(4, 12)), _LAYER, "head"),
    Model("LSTM classifier", partial(RecurrentClassifier, nn.LSTM), _labelled_tokens, ("table",), "head"),
    Model("GRU classifier", partial(RecurrentClassifier, nn.GRU), _labelled_tokens, ("table",), "head"),
]
MODELS = {model.name: model for model in _ENTRIES}
