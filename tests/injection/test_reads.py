"""An adapted weight is what all its readers see: who calls its layer, and who reads it from above."""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from perturbation import adapted
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from lightning_peft import (
    IA3,
    OFT,
    BitFit,
    BottleneckAdapter,
    DoRA,
    LinearProbe,
    LoRA,
    activate,
    active,
    disabled,
    inject,
    merge,
    remove,
    route,
)
from lightning_peft.core.method import Method
from lightning_peft.errors import NotApplicableError
from lightning_peft.injection.reads import ReadWeights
from lightning_peft.methods.lora import LoRAOutput


class Tied(nn.Module):
    """Embeds tokens and predicts them by one table, as Whisper's decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.norm = nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.fc(self.table(ids)).tanh())
        return h @ self.table.weight.T.to(h.dtype)


class Cosine(nn.Module):
    """A head that is read and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Embedding(11, 6), nn.Linear(6, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(F.normalize(self.body(ids), dim=-1), F.normalize(self.fc.weight))


class Codebook(nn.Module):
    """Distances to codes, read two levels up."""

    def __init__(self) -> None:
        super().__init__()
        self.cosine, self.codes = Cosine(), nn.ModuleList([nn.Embedding(7, 5), nn.Embedding(6, 5)])

    def forward(self, ids: Tensor) -> Tensor:
        h = self.cosine(ids) + self.cosine.fc.weight.sum()
        return torch.cat([torch.cdist(h, self.codes[i].weight[None]) for i in range(2)], -1)


def mamba() -> nn.Module:
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(**sizes))


def bloom(slow: bool = True) -> nn.Module:
    config = BloomConfig(
        vocab_size=11, hidden_size=16, n_layer=2, n_head=2, slow_but_exact=slow, pretraining_tp=2, hidden_dropout=0.0
    )
    return BloomForCausalLM(config)


def run(net: Callable[..., object], ids: Tensor) -> Tensor:
    output = net(ids)
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined, no-any-return]


def _cache_name(net: nn.Module) -> str:
    parameters = inspect.signature(net.forward).parameters
    return "cache" if "cache" in parameters else "cache_params"


NETS = (Tied, Cosine, Codebook, mamba, bloom)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 11, (3, 4))


@pytest.mark.parametrize("build", NETS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("method", [LoRA(r=2, target_modules=".*"), DoRA(r=2, target_modules=".*")], ids=str)
def test_unmerged_equals_merged_and_disabled_is_the_base(
    build: Callable[[], nn.Module], method: Method, ids: Tensor
) -> None:
    net = build()
    base = run(net.requires_grad_(False), ids)
    adapted(net, method)
    expected = run(net, ids)
    assert (expected - base).abs().max() > 0.01
    with disabled(net):
        assert torch.equal(run(net, ids), base)
    expected.sum().backward()
    assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(run(copied, ids), expected)
    merge(net, untie=True)
    torch.testing.assert_close(run(net, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [Tied, Cosine, Codebook], ids=lambda build: build.__name__)
def test_it_compiles_in_one_graph(build: Callable[[], nn.Module], ids: Tensor) -> None:
    net = adapted(build(), DoRA(r=2, target_modules=".*"))
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(ids), net(ids))


@pytest.mark.parametrize("build", [Tied, Cosine, bloom], ids=lambda build: build.__name__)
def test_what_trains_whole_gets_plain_torchs_gradients(build: Callable[[], nn.Module], ids: Tensor) -> None:
    plain, net = build(), build()
    net.load_state_dict(plain.state_dict())
    run(plain, ids).square().sum().backward()
    layer = {Tied: "table", Cosine: "fc", bloom: "mlp.dense_4h_to_h"}[build]
    inject(net, LinearProbe(modules_to_save=[layer]))
    run(net, ids).square().sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if f"{layer}.weight" in name}
    found = {name.replace(".peft.default", ""): p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_biases_that_are_read_train(ids: Tensor) -> None:
    net = adapted(mamba(), BitFit())
    expected = run(net, ids)
    expected.sum().backward()
    assert {name.split(".")[4] for name, p in net.named_parameters() if p.grad is not None} == {"conv1d", "dt_proj"}
    merge(net)
    torch.testing.assert_close(run(net, ids), expected)


def test_a_weight_is_computed_only_when_it_is_read(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[LoRAOutput] = []
    own = LoRAOutput.merge
    monkeypatch.setattr(LoRAOutput, "merge", lambda self, tensors: [merged.append(self), own(self, tensors)][1])
    for slow in (False, True):
        net = adapted(bloom(slow), LoRA(r=2, target_modules=["dense", "dense_4h_to_h"]))
        merged.clear()
        run(net, ids)
        assert len(set(merged)) == (4 if slow else 0)  # two layers in each of two blocks


def test_a_call_of_a_layer_that_is_read_comes_to_the_layer_itself(ids: Tensor) -> None:
    net = adapted(Tied(), LoRA(r=2, target_modules=["table"]))
    seen: list[nn.Module] = []
    net.table.register_forward_hook(lambda module, args, output: seen.append(module))
    net(ids)
    assert seen == [net.table]


@pytest.mark.parametrize("method", [BottleneckAdapter(target_modules=["fc"]), LoRA(target_modules=["fc"], dropout=0.1)])
def test_what_acts_where_a_layer_is_called_is_refused_on_one_that_never_is(method: Method) -> None:
    net = Cosine()
    before = dict(net.named_modules())
    with pytest.raises(NotApplicableError, match=r"'fc'.*module above"):
        inject(net, method)
    assert dict(net.named_modules()) == before


def test_with_the_last_adapter_the_readers_forward_is_its_own_again(ids: Tensor) -> None:
    net = Codebook()
    base = net(ids)
    adapted(net, LoRA(r=2, target_modules=".*"), "a")
    adapted(net, LoRA(r=2, target_modules=["codes.0"]), "b")
    assert sum(isinstance(module, ReadWeights) for module in net.modules()) == 3
    remove(net, "a")
    with active(net, "b"):
        assert not torch.equal(net(ids), base)
    remove(net, "b")
    assert not [module for module in net.modules() if "forward" in vars(module) or hasattr(module, "peft")]
    assert torch.equal(net(ids), base)


@pytest.mark.parametrize("build", [Tied, Codebook, mamba], ids=lambda build: build.__name__)
def test_rows_of_a_batch_read_weights_of_their_own(build: Callable[[], nn.Module], ids: Tensor) -> None:
    net = build().eval()
    for name in "ab":
        adapted(net, LoRA(r=2, target_modules=".*"), name)
    rows = ["b", None, "a"]
    with torch.no_grad(), route(net, rows):
        output = run(net, ids)
    for i, name in enumerate(rows):
        with torch.no_grad(), active(net, *([name] if name else [])):
            torch.testing.assert_close(output[i : i + 1], run(net, ids[i : i + 1]), rtol=1e-4, atol=1e-4)


def test_the_recurrent_states_of_rows_with_different_adapters_are_kept_apart(ids: Tensor) -> None:
    net = mamba().eval()
    for name in "ab":
        adapted(net, LoRA(r=2, target_modules=["conv1d", "dt_proj"]), name)
    rows = ["b", None, "a"]
    with torch.no_grad(), route(net, rows):
        cache = {_cache_name(net): net(ids, use_cache=True)[1]}
        output = net(ids[:, :1], **cache, use_cache=True).logits
    for i, name in enumerate(rows):
        with torch.no_grad(), active(net, *([name] if name else [])):
            whole = net(torch.cat([ids, ids[:, :1]], 1)[i : i + 1], use_cache=False).logits
        torch.testing.assert_close(output[i : i + 1], whole[:, -1:], rtol=1e-4, atol=1e-4)


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


def test_what_a_forward_makes_and_sets_is_kept_wherever_it_is() -> None:
    class Making(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.extra: nn.Module | None = None

        def step(self, x: Tensor) -> Tensor:
            self.seen = x
            return x

        def forward(self, x: Tensor) -> Tensor:
            if self.extra is None:
                self.extra = nn.Linear(4, 4)
            self.fc.calls = getattr(self.fc, "calls", 0) + 1
            self.register_buffer("last", x.detach())
            self.eval()
            return F.linear(self.extra(self.fc(self.step(x))), self.fc.weight)

    net, x = nn.Sequential(Making()), torch.randn(2, 4)
    inject(net, LoRA(r=2))
    net[0](x)
    made = net[0].extra
    assert isinstance(made, nn.Linear)
    net(x)
    assert net[0].extra is made
    assert net[0].fc.calls == 2
    assert net[0].seen is x
    assert torch.equal(net[0].last, x)
    assert not net[0].fc.training


def test_a_hook_may_be_put_on_a_layer_within_a_forward_that_reads_it() -> None:
    class Hooking(Reader):
        def forward(self, x: Tensor) -> Tensor:
            handle = self.fc.register_forward_hook(lambda *args: None)
            output = super().forward(x)
            handle.remove()
            return output

    net = adapted(nn.Sequential(Hooking()), LoRA(r=2))
    expected = net(torch.ones(1, 4))
    merge(net)
    torch.testing.assert_close(net(torch.ones(1, 4)), expected)


def test_what_a_hook_sets_on_a_reader_for_one_of_its_methods_is_not_missed_silently() -> None:
    class Late(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.fc.register_forward_hook(self.keep)

        def keep(self, module: nn.Module, args: object, output: Tensor) -> None:
            self.kept = output

        def head(self) -> Tensor:
            return F.linear(self.kept, self.fc.weight)

        def forward(self, x: Tensor) -> Tensor:
            self.fc(x)
            return self.head()

    net = nn.Sequential(Late())
    inject(net, LoRA(r=2))
    with pytest.raises(NotApplicableError, match=r"has set 'kept' of '0' \(Late\)"):
        net(torch.randn(2, 4))


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
