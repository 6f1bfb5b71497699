"""Every layer type as one (out, in) matrix."""

import copy
from collections.abc import Callable

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.errors import NotApplicableError
from lightning_peft.network.hosts import Host, find_hosts
from lightning_peft.network.layouts import ConvLayout, EmbeddingLayout
from lightning_peft.network.parameters import read_parameters

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[int, int]]] = {
    "linear": (lambda: nn.Linear(5, 7), lambda: torch.randn(2, 3, 5), (7, 5)),
    "linear_one_vector": (lambda: nn.Linear(5, 7), lambda: torch.randn(5), (7, 5)),
    "hf_conv1d": (lambda: Conv1D(7, 5), lambda: torch.randn(2, 3, 5), (7, 5)),
    "embedding": (lambda: nn.Embedding(9, 5, padding_idx=-1), lambda: torch.tensor([[0, 8], [3, 3]]), (5, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2), lambda: torch.randn(2, 4, 11), (6, 12)),
    "conv1d_unbatched": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(4, 11), (6, 12)),
    "conv2d": (
        lambda: nn.Conv2d(3, 6, (3, 2), (2, 1), (1, 2), (1, 2)),
        lambda: torch.randn(2, 3, 8, 7),
        (6, 18),
    ),
    "conv2d_groups": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
        lambda: torch.randn(2, 4, 6, 7),
        (6, 18),
    ),
    "conv2d_groups_unbatched": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(4, 6, 7), (6, 18)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, stride=2, groups=4), lambda: torch.randn(2, 4, 6, 7), (8, 9)),
    "conv2d_reflect": (
        lambda: nn.Conv2d(3, 6, 3, padding=(1, 2), padding_mode="reflect"),
        lambda: torch.randn(2, 3, 6, 7),
        (6, 27),
    ),
    "conv2d_reflect_same": (
        lambda: nn.Conv2d(3, 6, (2, 3), padding="same", padding_mode="replicate"),
        lambda: torch.randn(2, 3, 6, 7),
        (6, 18),
    ),
    "conv2d_same": (lambda: nn.Conv2d(3, 6, (3, 1), padding="same"), lambda: torch.randn(2, 3, 6, 7), (6, 9)),
    "conv2d_valid": (
        lambda: nn.Conv2d(3, 6, 3, padding="valid", padding_mode="circular"),
        lambda: torch.randn(2, 3, 6, 7),
        (6, 27),
    ),
    "conv3d": (
        lambda: nn.Conv3d(2, 6, 2, padding=1, padding_mode="circular", groups=2),
        lambda: torch.randn(2, 2, 4, 3, 5),
        (6, 8),
    ),
}


GPT2_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def _host(layer: nn.Module) -> Host:
    (host,) = find_hosts(layer)
    return host


@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_becomes_a_matrix_and_back(name: str) -> None:
    build, _, shape = LAYERS[name]
    host = _host(build())
    matrix = host.layout.matrix(host.weight)
    assert matrix.shape == shape == (host.layout.out_features, host.layout.in_features)
    assert torch.equal(host.layout.native(matrix), host.weight)


@pytest.mark.parametrize("name", LAYERS)
def test_down_and_up_equal_the_layer_with_the_product_added_to_its_weight(name: str) -> None:
    build, example, (rows, columns) = LAYERS[name]
    layer, x = build().double(), example()
    x = x.double() if x.is_floating_point() else x
    a, b = torch.randn(3, columns, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)
    layout = _host(layer).layout
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.weight += layout.native(b @ a)
        found = layer(x) + layout.up(layout.down(x, a), b)
        torch.testing.assert_close(found, changed(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("field", [{"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_an_embeddings_down_half_has_the_gradient_of_the_embedding_itself(field: dict[str, object]) -> None:
    table, ids = nn.Embedding(5, 3, **field), torch.tensor([[0, 2, 4], [4, 4, 2]])
    table(ids).square().sum().backward()
    layout = _host(table).layout
    a = table.weight.detach().T.clone().requires_grad_()
    layout.down(ids, a).square().sum().backward()
    torch.testing.assert_close(a.grad.T, table.weight.grad)


def test_a_layout_is_told_from_the_layer_type() -> None:
    assert isinstance(_host(nn.Embedding(3, 4)).layout, EmbeddingLayout)
    assert isinstance(_host(nn.Conv2d(3, 4, 1)).layout, ConvLayout)
    linear = {name: _host(build()).linear for name, (build, _, _) in LAYERS.items()}
    assert {name for name, value in linear.items() if value} == {"linear", "linear_one_vector", "hf_conv1d"}


def test_a_subclass_of_a_layer_is_that_layer() -> None:
    class Named(nn.Linear):
        pass

    assert _host(Named(2, 3)).layout == _host(nn.Linear(2, 3)).layout


def test_attention_with_one_width_has_two_weights_that_it_reads_itself() -> None:
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})
    hosts = list(find_hosts(attention))
    assert [(h.name, h.path, h.parameter, h.part) for h in hosts] == [
        ("mha.in_proj", "mha", "in_proj_weight", "in_proj_weight"),
        ("mha.out_proj", "mha", "out_proj.weight", "out_proj_weight"),
    ]
    assert [(h.layout.out_features, h.layout.in_features) for h in hosts] == [(24, 8), (8, 8)]
    assert all(h.weight_only and h.linear for h in hosts)
    assert hosts[1].weight is attention["mha"].out_proj.weight


def test_attention_with_other_key_and_value_widths_has_four_weights() -> None:
    hosts = list(find_hosts(nn.MultiheadAttention(8, 2, kdim=5, vdim=6)))
    assert {h.name: tuple(h.weight.shape) for h in hosts} == {
        "q_proj": (8, 8),
        "k_proj": (8, 5),
        "v_proj": (8, 6),
        "out_proj": (8, 8),
    }
    assert all((h.layout.out_features, h.layout.in_features) == tuple(h.weight.shape) for h in hosts)


def test_hosts_come_in_the_order_of_the_modules() -> None:
    names = [host.name for host in find_hosts(tiny_models.gpt2())]
    assert names == [
        "transformer.wte",
        "transformer.wpe",
        *(
            f"transformer.h.{i}.{part}"
            for i in (0, 1)
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ),
        "lm_head",
    ]


def test_a_module_that_is_used_twice_is_one_host() -> None:
    shared = nn.Linear(3, 3)
    assert [host.name for host in find_hosts(nn.ModuleDict({"a": shared, "b": shared}))] == ["a"]


def test_layers_without_a_matrix_are_no_hosts() -> None:
    layers = [nn.LayerNorm(3), nn.ConvTranspose2d(3, 4, 2), nn.LSTM(3, 4), nn.BatchNorm1d(3), nn.ReLU()]
    assert list(find_hosts(nn.ModuleList(layers))) == []


@pytest.mark.parametrize("lazy", [nn.LazyLinear, lambda n: nn.LazyConv2d(n, 3), lambda _: nn.LazyBatchNorm1d()])
def test_a_lazy_layer_is_refused_with_what_to_do(lazy: Callable[[int], nn.Module]) -> None:
    net = nn.ModuleDict({"stem": lazy(4)})
    with pytest.raises(NotApplicableError, match=r"at 'stem' has no weight yet.*[Rr]un one batch"):
        list(find_hosts(net))


def test_what_a_module_reads_is_its_own_parameters_and_kept_buffers() -> None:
    norm = nn.BatchNorm1d(3)
    norm.register_buffer("scratch", torch.zeros(3), persistent=False)
    assert read_parameters(norm) == ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert read_parameters(nn.LSTM(2, 3)) == ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    assert read_parameters(nn.Sequential(nn.Linear(2, 2))) == ()
    assert read_parameters(nn.MultiheadAttention(4, 2)) == (
        "in_proj_weight",
        "in_proj_bias",
        "out_proj.weight",
        "out_proj.bias",
    )
