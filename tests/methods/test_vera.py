"""VeRA against its formula, its paper's counts, and what it shares."""

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from perturbation import perturb
from snapshot import assert_identical
from torch import nn

from lightning_peft import VeRA, inject, load_adapter, merge, save_adapter
from lightning_peft.errors import ConfigError, NotApplicableError
from lightning_peft.methods.vera import Projections

IDS = torch.tensor([[9, 7, 12, 33, 21, 8]])


@torch.no_grad()
def test_it_computes_the_formula() -> None:
    net = nn.ModuleDict({"wide": nn.Linear(6, 4), "narrow": nn.Linear(3, 5)})
    base = copy.deepcopy(net)
    inject(net, VeRA(r=7, target_modules=["wide", "narrow"]))
    perturb(net)
    shared = net["wide"].peft.get_submodule("default:shared")
    assert (shared.A.shape, shared.B.shape) == ((7, 6), (5, 7))  # as wide as the widest
    for name, size_in, size_out in (("wide", 6, 4), ("narrow", 3, 5)):
        own, x = net[name].peft.default, torch.randn(2, size_in)
        h = own.lambda_d * (x @ shared.A[:, :size_in].T)
        expected = base[name](x) + own.lambda_b * (h @ shared.B[:size_out].T)
        torch.testing.assert_close(net[name](x), expected)


def test_as_many_parameters_train_as_in_the_paper() -> None:
    """RoBERTa base, queries and values, r = 1024: 0.043 million (table 2)."""
    with torch.device("meta"):
        net = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(768, 768), "value": nn.Linear(768, 768)}) for _ in range(12)
        )
    assert inject(net, VeRA(r=1024, target_modules=["query", "value"])).trainable == 43_008


def test_what_is_shared_is_stored_once_or_drawn_again(tmp_path: Path) -> None:
    base, sizes = tiny_models.bert().eval(), {}
    for save in (True, False):
        model, other = copy.deepcopy(base), copy.deepcopy(base)
        inject(model, VeRA(r=64, save_projection=save, projection_prng_key=3))
        perturb(model)
        save_adapter(model.eval(), tmp_path / str(save))
        sizes[save] = (tmp_path / str(save) / "adapter_model.safetensors").stat().st_size
        torch.manual_seed(5)
        load_adapter(other, tmp_path / str(save))
        assert_identical(other.eval()(IDS).logits, model(IDS).logits)
    (shared,) = (m for m in model.modules() if isinstance(m, Projections))
    drawn = 4 * (shared.A.numel() + shared.B.numel())  # bytes
    assert 0 < sizes[True] - sizes[False] - drawn < 300  # names in the header


def test_two_seeds_are_two_projections() -> None:
    nets = [nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in "ab"]
    for seed, net in enumerate(nets):
        inject(net, VeRA(r=2, target_modules=["fc"], projection_prng_key=seed))
    first, second = (net["fc"].peft.get_submodule("default:shared").A for net in nets)
    assert not torch.equal(first, second)


@torch.no_grad()
def test_it_merges() -> None:
    net, x = nn.ModuleDict({"fc": nn.Linear(6, 4), "out": nn.Linear(4, 3)}), torch.randn(2, 6)
    inject(net, VeRA(r=7, target_modules=["fc", "out"]))
    perturb(net)
    expected = net["out"](net["fc"](x))
    merge(net)
    torch.testing.assert_close(net["out"](net["fc"](x)), expected)
    assert not hasattr(net["fc"], "peft")


def test_a_seed_means_the_same_under_every_default_of_torch(tmp_path: Path) -> None:
    base, x = nn.ModuleDict({"fc": nn.Linear(64, 64)}), torch.randn(2, 64)
    trained = copy.deepcopy(base)
    torch.set_default_dtype(torch.float64)
    try:
        inject(trained, VeRA(r=1024, save_projection=False))  # far more than the base has
    finally:
        torch.set_default_dtype(torch.float32)
    perturb(trained)
    save_adapter(trained, tmp_path)
    other = copy.deepcopy(base)
    load_adapter(base, tmp_path)
    assert_identical(base["fc"](x), trained["fc"](x))
    with torch.device("meta"):
        inject(other, VeRA(r=2))
    assert not any(tensor.is_meta for tensor in other.state_dict().values())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(NotApplicableError, match=r"VeRA\.dropout=0\.5 cannot act on 'in_proj'"):
        inject(nn.MultiheadAttention(8, 2), VeRA(r=2, dropout=0.5, target_modules=["in_proj"]))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"VeRA\.d_initial must be a finite number"):
            VeRA(d_initial=value)
    with pytest.raises(NotApplicableError, match="as wide as its vocabulary"):
        inject(tiny_models.bert(), VeRA(target_modules=["word_embeddings"]))
    with pytest.raises(ConfigError, match=r"VeRA\.projection_prng_key must be a whole number, at least 0, not -1"):
        VeRA(projection_prng_key=-1)
