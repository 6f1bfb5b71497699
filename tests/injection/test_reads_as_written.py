"""However somebody's code reads a layer's weight, it sees what a call of the layer sees."""

import copy
import functools
from collections.abc import Callable
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from perturbation import adapted
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from lightning_peft import (
    IA3,
    OFT,
    DoRA,
    LinearProbe,
    LoRA,
    activate,
    inject,
    merge,
)
from lightning_peft.core.method import Method
from lightning_peft.errors import NotApplicableError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Reader(nn.Module):
    """Calls its layer and reads it, each as somebody's code does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.fc.weight)


class UnderNoGrad(Reader):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = self.fc.weight.norm()
        return F.linear(self.fc(x), self.fc.weight) + norm


class Recomputed(Reader):
    use_reentrant = False

    def inner(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.fc.weight).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.use_reentrant)


class Reentrant(Recomputed):
    use_reentrant = True


class ByAnotherName(Reader):
    def forward(self, x: Tensor) -> Tensor:
        fc = self.fc
        weight = fc.weight
        return F.linear(fc(x), weight)


class OneByOne(Reader):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.pair:
            x = F.linear(layer(x), layer.weight)
        for _, layer in enumerate(self.pair):
            x = x + layer.weight.sum()
        x = self.fc(x) + sum(m.weight.sum() for m in (self.fc, self.pair[0]))
        return x + getattr(self.fc, "bias").sum()  # noqa: B009


class Data(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.fc.weight.data)


class ByItsBase(Reader):
    def forward(self, x: Tensor) -> Tensor:
        return Reader.forward(self, x)


class Cached(Reader):
    @functools.cached_property
    def factor(self) -> int:
        return 2

    @property
    def norm(self) -> Tensor:
        return self.fc.weight.norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) / self.norm * self.factor


class Pairs(nn.Sequential):
    """Runs its children by itself, and reads one."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self[0](self[1](x)), self[0].weight)


READERS = [
    *(Reader, UnderNoGrad, Recomputed, Reentrant, ByAnotherName, OneByOne, Data, ByItsBase, Cached, Pairs),
]


@pytest.mark.parametrize(
    "method", [LoRA(r=2, target_modules=".*"), LinearProbe(modules_to_save=["net"])], ids=["LoRA", "whole"]
)
@pytest.mark.parametrize("kind", READERS)
def test_however_it_is_written_gradients_are_those_of_the_merged_weights(kind: type[nn.Module], method: Method) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = kind()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    net, x = Net(), torch.randn(3, 4)
    adapted(net, method)
    output = net(x.clone())
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.requires_grad and p.grad is not None}
    twin = copy.deepcopy(net)
    merge(twin)
    twin.requires_grad_(True)
    expected = twin(x.clone())
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward()
    for name, gradient in gradients.items():
        layer, _, rest = name.partition(".peft.default.")
        own = twin.get_submodule(layer)
        if rest.startswith("lora"):  # d/dB of W + s B A is s dW Aᵀ
            adapter = net.get_submodule(f"{layer}.peft.default")
            weight = own.weight.grad
            gradient_of = {"lora_B": weight @ adapter.lora_A.T, "lora_A": adapter.lora_B.T @ weight}
            torch.testing.assert_close(gradient, adapter.scale * gradient_of[rest], rtol=1e-3, atol=1e-3)
        else:
            torch.testing.assert_close(gradient, own.get_parameter(rest).grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "second",
    [
        LinearProbe(modules_to_save=["fc"]),
        OFT(block_size=2, target_modules=["fc"]),
        DoRA(r=2),
        IA3(target_modules=["fc"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_several_adapters_are_read_as_they_are_called(second: Method, order: str) -> None:
    class Compared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.fc.weight) - self.fc(x)

    net = Compared()
    adapted(net, LoRA(r=2, target_modules=["fc"]), "a")
    adapted(net, second, "b")
    activate(net, *order)
    torch.testing.assert_close(net(torch.eye(4)), torch.zeros(4, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_one_reads_and_another_calls_is_called(first: bool) -> None:
    class Head(nn.Module):
        def __init__(self, table: nn.Module) -> None:
            super().__init__()
            self.table = table

        def forward(self, h: Tensor) -> Tensor:
            return h @ self.table.weight.T

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = nn.Embedding(11, 4)
            if first:
                self.head, self.table = Head(table), table
            else:
                self.table, self.head = table, Head(table)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    net, ids = Shared(), torch.randint(11, (2, 3))
    adapted(net, LoRA(r=2, target_modules=".*"))
    expected = net(ids)
    merge(net)
    torch.testing.assert_close(net(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrap",
    [checkpoint_wrapper, lambda module: torch.compile(module, backend="eager")],
    ids=["checkpointed", "compiled"],
)
@pytest.mark.parametrize("inside", [True, False])
def test_what_torch_has_wrapped_reads_and_is_read(wrap: Callable[[nn.Module], nn.Module], inside: bool) -> None:
    reader, x = Reader(), torch.randn(2, 4)
    if inside:
        reader.fc = wrap(reader.fc)
    net = adapted(nn.Sequential(reader if inside else wrap(reader)), LoRA(r=2))
    expected = net(x)
    merge(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_a_codebook_that_is_written_while_it_is_read_is_refused() -> None:
    class Quantizer(Reader):
        def forward(self, x: Tensor) -> Tensor:
            nearest = torch.cdist(x, self.fc.weight).argmin(1)
            with torch.no_grad():
                self.fc.weight[nearest] = 0.9 * self.fc.weight[nearest] + 0.1 * x
            return F.embedding(nearest, self.fc.weight)

    with pytest.raises(NotApplicableError, match=r"'0' \(Quantizer\) reads the weights of '0\.fc'.* and writes"):
        inject(nn.Sequential(Quantizer()), LoRA(r=2, target_modules=["fc"]))


def test_a_forward_that_was_given_to_one_module_is_read() -> None:
    def given(self: Reader, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)

    reader, x = Reader(), torch.randn(2, 4)
    reader.forward = MethodType(given, reader)  # type: ignore[method-assign]
    net = adapted(nn.Sequential(reader), LoRA(r=2, target_modules=["fc"]))
    expected = net(x)
    merge(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def test_what_a_method_beside_the_forward_reads_is_told_in_the_report() -> None:
    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = Reader(), nn.Linear(4, 2)
            self.reset_parameters()

        def reset_parameters(self) -> None:
            nn.init.normal_(self.head.weight)

        def training_step(self, x: Tensor) -> Tensor:
            return F.linear(self.net(x), self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x))

    report = inject(Stepping(), LoRA(r=2, modules_to_save=["head"]))
    assert report.notes == (
        "LoRA 'default': Stepping.training_step reads the weights of 'head' and is not part of a forward: it sees the "
        "base's. Read them in a forward.",
    )
