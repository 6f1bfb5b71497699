"""Single entries of matrices, the largest ones, train as they would in plain torch with a mask."""

import pytest
import tiny_models
import torch
from plain_training import logits, masked, trained
from torch import nn

from lightning_peft import SelectiveTuning, inject, merge
from lightning_peft.checkpoints.ckpt import adapter_state


@pytest.mark.parametrize("density", [0.001, 0.1, 0.9])
def test_of_a_matrix_the_largest_entries_train(density: float) -> None:
    model = tiny_models.bert().eval()
    names = [n for n, p in model.named_parameters() if p.dim() == 2 and ".layer." in n]
    count, masks = 0, {}
    for name in names:
        size = model.get_parameter(name).detach().abs()
        k = max(1, round(density * size.numel()))
        masks[name] = size >= size.flatten().sort(descending=True).values[k - 1]
        count += k
    expected = masked(model, masks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = SelectiveTuning(parameter_types=["weight"], layers=[0, 1], density=density, modules_to_save=None)
    report = inject(model, method)
    assert report.trainable == count
    assert sum(tensor.numel() for tensor in adapter_state(model).values()) == 2 * count  # each with its position
    torch.testing.assert_close(logits(model), logits(expected))
    losses = trained(expected, logits, weight_decay=0)
    torch.testing.assert_close(torch.tensor(trained(model, logits, weight_decay=0)), torch.tensor(losses))
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-5)
    merge(model)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-5)
    for name, p in model.named_parameters():
        moved = p != before[name]
        assert torch.equal(moved, masks[name]) if name in masks else not moved.any(), name


def test_with_density_vectors_train_only_where_they_are_asked_for() -> None:
    for fields, vectors in [({}, 0), ({"parameter_types": ["weight", "bias"]}, 16), ({"parameters": [".*"]}, 16)]:
        report = inject(
            tiny_models.bert(),
            SelectiveTuning(target_modules=["pooler"], density=0.25, modules_to_save=None, **fields),
        )
        assert report.trainable == 16 * 16 // 4 + vectors


def test_kernels_tables_and_attention_can_be_sparse() -> None:
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(2, 4, 3, bias=False), "table": nn.Embedding(10, 4), "mha": nn.MultiheadAttention(4, 2)}
    )
    report = inject(model, SelectiveTuning(density=0.5))
    assert {(row.host, row.trainable) for row in report.hosts} == {("conv", 36), ("table", 20), ("mha", 24), ("mha", 8)}


def test_a_tied_table_can_be_sparse() -> None:
    model = tiny_models.llama().eval()
    table = model.lm_head.weight.detach().abs()
    mask = table >= table.flatten().sort(descending=True).values[63]
    expected = masked(model, {"model.embed_tokens.weight": mask})
    assert inject(model, SelectiveTuning(parameter_types=["embedding"], density=0.1)).trainable == 64
    trained(model, logits, weight_decay=0)
    trained(expected, logits, weight_decay=0)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-5)
    merge(model)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-5)
