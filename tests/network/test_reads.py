"""Which weights a class reads off the modules below it is read off its source."""

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomMLP
from transformers.models.sam.modeling_sam import SamMaskDecoder
from transformers.models.t5.modeling_t5 import T5DenseActDense
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from lightning_peft.network.reads import Read, _reads, reads_of


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.project(self.table(ids))

    def project(self, h: Tensor) -> Tensor:
        return h @ self.table.weight.T.to(h.dtype)


class Cosine(Tied):
    """Its forward calls what the base's comes to, and reads a layer that it never calls."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(super().forward(ids), F.normalize(self.fc.weight[:, :5]))


class Questions(Tied):
    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.fc.weight, Tensor) and self.fc.bias is not None and hasattr(self.fc, "weight"):
            ids = ids.to(self.fc.weight.device)
        self.fc.weight.data.clamp_(-1, 1)
        return self.fc(self.table(ids).to(self.fc.weight.dtype)).view(self.fc.weight.shape[0], -1)


class Elsewhere(Tied):
    """Reads that no forward comes to, and a write."""

    def __init__(self) -> None:
        super().__init__()
        self.fc.weight = nn.Parameter(self.table.weight[:4].detach())

    def reset(self) -> None:
        nn.init.normal_(self.fc.weight)

    def forward(self, ids: Tensor) -> Tensor:
        self.fc.scale = 1.0
        return self.fc(self.table(ids))


class Further(nn.Module):
    """Reads below a child, and from a list by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.layers = Tied(), nn.ModuleList([nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4, bias=False)])

    def forward(me, ids: Tensor) -> Any:  # noqa: N805 - nothing has to be called self
        h = me.inner.table.weight[ids]
        for i in (0, 2):
            h = F.linear(h, me.layers[i].weight, me.layers[i].bias)
        return h


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (nn.Linear, {}),
        (nn.TransformerEncoderLayer, {}),
        (Tied, {"table": (("weight",), False)}),
        (Cosine, {"table": (("weight",), False), "fc": (("weight",), True)}),
        (Questions, {}),
        (Elsewhere, {}),
        (Further, {"inner.table": (("weight",), True), "layers.*": (("bias", "weight"), True)}),
        (T5DenseActDense, {}),
        (BloomMLP, {"dense_4h_to_h": (("weight",), False)}),
        (WavLMAttention, {f"{name}_proj": (("bias", "weight"), True) for name in ("q", "k", "v", "out")}),
        (SamMaskDecoder, {f"{name}_token{s}": (("weight",), True) for name, s in (("iou", ""), ("mask", "s"))}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_reads_are_told_from_calls_questions_and_writes(kind: type[nn.Module], found: dict[str, Any]) -> None:
    assert {read.path: (read.names, read.only) for read in _reads(kind, kind.forward)} == found


def test_what_is_there_is_found_by_its_path() -> None:
    net = Further()
    assert [(read, layer) for read, layer in reads_of(net)] == [
        (Read("inner.table", ("weight",), only=True), net.inner.table),
        (Read("layers.0", ("bias", "weight"), only=True), net.layers[0]),
        (Read("layers.2", ("weight",), only=True), net.layers[2]),
    ]


def test_a_class_without_source_reads_nothing() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.fc.weight", space)
    assert _reads(space["Made"], space["Made"].forward) == ()
