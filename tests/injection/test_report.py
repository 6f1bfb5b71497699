"""What was injected, what trains and what is frozen."""

import tiny_models
import torch
import transformers as hf
from torch import nn

from lightning_peft import LoRA, activate, inject, report
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


def test_a_rank_above_a_layers_smaller_side_is_a_line_of_the_report() -> None:
    net = nn.ModuleDict({"body": nn.Linear(16, 16), "value": nn.Linear(16, 1)})
    found = inject(net, LoRA(r=8))
    assert [row.host for row in found.hosts] == ["body", "value"]
    (line,) = found.notes
    assert line.startswith("LoRA 'default': the rank is larger than the smaller side of 1 layers, such as 8 at 'value'")
    assert "which can use 1" in " ".join(str(found).split())
    assert report(net) == found


def test_weights_that_no_host_has_are_left_out_and_reported() -> None:
    config = hf.MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    found = inject(hf.MixtralForCausalLM(config), LoRA(r=2))
    experts = [name for name, _ in found.left_out if "experts" in name]
    assert len(experts) == 4  # two weights a layer
    assert "left out: model.layers.*.mlp.experts.gate_up_proj (2): no known layer: MixtralExperts" in " ".join(
        str(found).split()
    )
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "rnn": nn.LSTM(4, 4), "pair": nn.Bilinear(2, 3, 4)})
    assert [name for name, _ in inject(net, LoRA(r=2)).left_out] == [
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "pair.weight",
    ]
    assert inject(tiny_models.vit(), LoRA(r=2)).left_out == ()  # tables of positions multiply nothing


def test_a_report_of_the_meta_device_counts_as_well() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(1000, 1000))
    assert inject(net, LoRA(r=8)).trainable == 16_000
