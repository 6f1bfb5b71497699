"""An adapted weight is what all its readers see: who calls its layer, and who reads it from above."""

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from perturbation import adapted
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from lightning_peft import (
    BitFit,
    BottleneckAdapter,
    DoRA,
    LinearProbe,
    LoRA,
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
