"""What was injected, what trains and what is frozen."""

import pytest
import tiny_models
import torch
from torch import nn

from lightning_peft import LoRA, activate, inject, report
from lightning_peft.errors import ConfigError
from lightning_peft.injection.report import HostRow, PartRow


def test_a_report_counts_hosts_parameters_and_parts() -> None:
    model = tiny_models.bert()
    total = sum(p.numel() for p in model.parameters())
    found = inject(model, LoRA(r=2, target_modules=["query", "output.dense"], layers=[1]), "task")
    per_layer = 2 * (16 + 16)
    prefix = "bert.encoder.layer.1"
    assert found.hosts == (
        HostRow(f"{prefix}.attention.self.query", "Linear", "task", "LoRA", per_layer),
        HostRow(f"{prefix}.attention.output.dense", "Linear", "task", "LoRA", per_layer),
        HostRow(f"{prefix}.output.dense", "Linear", "task", "LoRA", 2 * (24 + 16)),
        HostRow("classifier", "Linear", "task", "fully trained", 34),
    )
    trainable = 2 * per_layer + 2 * (24 + 16) + 34
    assert found.trainable == trainable
    assert found.total == total + trainable
    assert found.share == trainable / (total + trainable)
    assert found.left_out == ()
    assert report(model) == found


def test_parts_say_what_happens_to_each_and_add_up_to_the_base() -> None:
    model = tiny_models.bert()
    total = sum(p.numel() for p in model.parameters())
    parts = inject(model, LoRA(r=2, target_modules=["query"])).parts
    assert [(part.path, part.state) for part in parts] == [("bert", "frozen, adapted"), ("classifier", "fully trained")]
    assert sum(part.parameters for part in parts) == total


def test_parts_begin_where_the_model_branches() -> None:
    net = nn.ModuleDict({"net": nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})})
    parts = inject(net, LoRA(r=2, target_modules=["body"], modules_to_save=None)).parts
    assert parts == (PartRow("net.body", 20, "frozen, adapted"), PartRow("net.head", 10, "frozen"))


def test_tied_parameters_count_once() -> None:
    model = tiny_models.llama()
    total = sum(p.numel() for p in model.parameters())
    found = inject(model, LoRA(target_modules=["q_proj"]))
    assert found.total == total + found.trainable


def test_only_what_trains_counts_as_trainable() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    inject(net, LoRA(r=1), "a")
    inject(net, LoRA(r=2), "b")
    assert report(net).trainable == 8 + 16
    activate(net, "b")
    assert report(net).trainable == 16
    assert [(row.adapter, row.trainable) for row in report(net).hosts] == [("a", 0), ("b", 16)]


def test_a_model_without_adapters_has_a_report() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    found = report(net)
    assert (found.hosts, found.trainable, found.total) == ((), 30, 30)
    assert report(nn.ReLU()).share == 0.0


def test_adapters_below_a_model_are_reported_by_their_path_from_it() -> None:
    net = nn.ModuleDict({"student": nn.Sequential(nn.Linear(4, 4))})
    inject(net["student"], LoRA(r=2))
    assert [row.host for row in report(net).hosts] == ["student.0"]


def test_a_printed_report_groups_layers_and_ends_with_the_total() -> None:
    model = tiny_models.bert()
    lines = str(inject(model, LoRA(r=2, target_modules=["query"]))).splitlines()
    (row,) = [line for line in lines if "query" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "bert.encoder.layer.*.attention.self.query",
        "Linear",
        "LoRA",
        "2",
        "128",
    ]
    trainable = 128 + 34
    total = sum(p.numel() for p in model.parameters())
    assert lines[-1] == f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%})"


def test_two_adapters_are_told_apart_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    inject(net, LoRA(r=2), "first")
    text = str(inject(net, LoRA(r=2), "second"))
    assert "first: LoRA" in text
    assert "second: LoRA" in text


def test_numbers_inside_a_name_are_not_taken_for_layers() -> None:
    net = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})
    text = str(inject(net, LoRA(r=2)))
    assert "fc1" in text
    assert "fc2" in text


def test_a_model_that_is_itself_the_host_is_called_so() -> None:
    assert "(the whole model)" in str(inject(nn.Linear(4, 4), LoRA(r=2, target_modules=".*")))


def test_a_layer_too_small_for_the_rank_is_left_out_and_reported() -> None:
    net = nn.ModuleDict({"body": nn.Linear(16, 16), "value": nn.Linear(16, 1)})
    found = inject(net, LoRA(r=8))
    assert [row.host for row in found.hosts] == ["body"]
    ((name, reason),) = found.left_out
    assert name == "value"
    assert "rank 8 is larger than 'value' (1 x 16)" in reason
    assert "left out: value: rank 8 is larger than" in str(found)
    assert report(net) == found


def test_if_no_layer_fits_it_is_an_error() -> None:
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "value": nn.Linear(4, 1)})
    with pytest.raises(ConfigError, match=r"rank 8 is larger than '(body|value)'.*use r <= "):
        inject(net, LoRA(r=8))
    assert all(p.requires_grad for p in net.parameters())


def test_a_layer_chosen_by_name_is_never_left_out() -> None:
    net = nn.ModuleDict({"body": nn.Linear(16, 16), "value": nn.Linear(16, 1)})
    with pytest.raises(ConfigError, match="rank 8 is larger than 'value'"):
        inject(net, LoRA(r=8, target_modules=["body", "value"]))


def test_a_report_of_the_meta_device_counts_as_well() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(1000, 1000))
    assert inject(net, LoRA(r=8)).trainable == 16_000
