"""LoHa and OFT against their formulas."""

import copy

import pytest
import torch
from perturbation import perturb
from torch import Tensor, nn

from lightning_peft import OFT, LoHa, inject, merge
from lightning_peft.errors import ConfigError, NotApplicableError


@torch.no_grad()
def test_loha_adds_the_elementwise_product_of_two_products() -> None:
    net = nn.ModuleDict({"fc": nn.Linear(9, 8)})
    base, x = copy.deepcopy(net), torch.randn(3, 9)
    inject(net, LoHa(r=2, alpha=6, target_modules=["fc"]))
    torch.testing.assert_close(net["fc"](x), base["fc"](x))
    perturb(net)
    own = net["fc"].peft.default
    change = 3 * (own.hada_w1_a @ own.hada_w1_b) * (own.hada_w2_a @ own.hada_w2_b)
    torch.testing.assert_close(net["fc"](x), base["fc"](x) + x @ change.T)
    assert torch.linalg.matrix_rank(change) == 4  # r², of 2 r (in + out) parameters
    assert sum(p.numel() for p in own.parameters()) == 2 * 2 * (9 + 8)


@torch.no_grad()
def test_loha_acts_on_a_grouped_convolution_as_on_its_kernel() -> None:
    net, x = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=1)}), torch.randn(2, 4, 8, 8)
    inject(net, LoHa(r=2, target_modules=["conv"]))
    perturb(net)
    expected = net["conv"](x)
    merge(net)
    torch.testing.assert_close(net["conv"](x), expected)


def cayley(q: Tensor) -> Tensor:
    one = torch.eye(len(q))
    return (one - q) @ torch.linalg.inv(one + q)


@torch.no_grad()
def test_oft_rotates_the_input_by_blocks_and_keeps_the_angles_of_a_weight() -> None:
    net = nn.ModuleDict({"fc": nn.Linear(6, 5)})
    base, x = copy.deepcopy(net), torch.randn(4, 6)
    inject(net, OFT(block_size=3, use_cayley_neumann=False, target_modules=["fc"]))
    torch.testing.assert_close(net["fc"](x), base["fc"](x))
    perturb(net)
    entries, blocks = net["fc"].peft.default.oft_R, []
    for a, b, c in entries.tolist():
        blocks.append(cayley(torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]])))
    r = torch.block_diag(*blocks)
    torch.testing.assert_close(r @ r.T, torch.eye(6))
    torch.testing.assert_close(net["fc"](x), base["fc"](x @ r))
    merge(net)
    before, after = base["fc"].weight, net["fc"].weight
    torch.testing.assert_close(after @ after.T, before @ before.T)  # lengths and angles of its rows


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6])
@torch.no_grad()
def test_the_series_comes_near_the_inverse_and_turns_the_other_way_as_in_peft(terms: int) -> None:
    nets = [nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in "ab"]
    for net, exact in zip(nets, (True, False), strict=True):
        inject(
            net, OFT(block_size=4, use_cayley_neumann=not exact, num_cayley_neumann_terms=terms, target_modules=["fc"])
        )
        net["fc"].peft.default.oft_R.copy_(torch.linspace(-0.05, 0.05, 6))
    exact, near = (net["fc"].peft.default.rotation() for net in nets)
    assert (exact.mT - near).abs().max() < 0.4 ** min(terms, 5)


def test_a_block_is_the_nearest_that_divides_the_features() -> None:
    net = nn.ModuleDict({"fc": nn.Linear(48, 4), "prime": nn.Linear(7, 4)})
    inject(net, OFT(target_modules=["fc", "prime"]))
    assert net["fc"].peft.default.oft_R.shape == (2, 24 * 23 // 2)
    assert net["prime"].peft.default.oft_R.shape == (1, 7 * 6 // 2)


def test_what_oft_cannot_rotate_is_refused() -> None:
    with pytest.raises(ConfigError, match="no block of nearly 2 fits the 7 inputs of 'fc'"):
        inject(nn.ModuleDict({"fc": nn.Linear(7, 4)}), OFT(block_size=2, target_modules=["fc"]))
    with pytest.raises(NotApplicableError, match="'table' looks up indices"):
        inject(nn.ModuleDict({"table": nn.Embedding(8, 4)}), OFT(target_modules=["table"]))
