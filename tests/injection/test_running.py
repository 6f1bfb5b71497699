"""Layers whose adapters do nothing, since they do not run, are told and not merged."""

import copy
import warnings

import pytest
import torch
from tiny_models import bert
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_peft import LoRA, activate, active, disabled, inject, merge, merged, remove, save_adapter
from lightning_peft.errors import NotApplicableError


class Attention(nn.Module):
    """As diffusers has it: one layer may take the place of two."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def fuse(self) -> None:
        self.to_qk = nn.Linear(4, 8)
        with torch.no_grad():
            self.to_qk.weight.copy_(torch.cat([self.to_q.weight, self.to_k.weight]))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.to_qk(x).chunk(2, -1) if hasattr(self, "to_qk") else (self.to_q(x), self.to_k(x))
        return self.to_out(q * k)


class Branches(nn.Module):
    """One branch or the other, and experts of which some run."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor, image: bool = False) -> Tensor:
        return self.experts[1]((self.image if image else self.text)(x))


def test_a_layer_that_another_one_has_replaced_is_told_and_refused(tmp_path: pytest.TempPathFactory) -> None:
    net, x = nn.Sequential(Attention(), Attention()), torch.randn(2, 4)
    inject(net, LoRA(r=2))
    net(x)
    save_adapter(net, tmp_path / "before")  # type: ignore[operator]
    net[0].fuse()
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):  # it stays so until a forward has shown it
        with pytest.raises(
            NotApplicableError, match=r"'0', which holds adapted layers, has got 'to_qk'.*run one batch"
        ):
            merge(net)
    with pytest.warns(UserWarning, match=r"have not run in a forward of Sequential: 2, first '0\.to_q'"):
        net(x)
    for refused in (merge, lambda net: merged(net).__enter__(), lambda net: save_adapter(net, tmp_path / "after")):  # type: ignore[operator]
        with pytest.raises(
            NotApplicableError, match=r"has got 'to_qk' since .* 2 of them have not run since, first '0\.to_q'"
        ):
            refused(net)
    assert not (tmp_path / "after").exists()  # type: ignore[operator]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net(x)  # told once
    del net[0].to_qk
    net(x)
    merge(net)


@pytest.mark.parametrize("forwards", [0, 1])
def test_what_the_base_alone_does_changes_nothing_of_that(forwards: int) -> None:
    """Nor what a model does that is called by its parts, or as a LightningModule is."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(Attention())

        def training_step(self) -> None: ...

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    net, x = Steps(), torch.randn(2, 4)
    inject(net, LoRA(r=2))
    net(x)
    net.net[0].fuse()
    for _ in range(forwards):
        net(x)
    with disabled(net):
        net.net(x)
    with pytest.raises(NotApplicableError, match="2 of them have not run since" if forwards else "run one batch"):
        merge(net)
    del net.net[0].to_qk
    net.net[0](x)
    merge(net)


def test_an_adapter_that_acts_in_a_block_alone_is_looked_at_too() -> None:
    class Unread(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return self.to_out(self.to_k(x))

    net, x = nn.Sequential(Unread()), torch.randn(2, 4)
    inject(net, LoRA(r=2, target_modules=["to_out"]), "a")
    inject(net, LoRA(r=2, target_modules=["to_q"]), "b")
    activate(net, "a")
    with disabled(net):
        net(x)
    net(x)
    with active(net, "b"), pytest.warns(UserWarning, match=r"first '0\.to_q'"):
        net(x)


def test_after_a_batch_the_refusal_says_what_it_has_shown() -> None:
    net, x = nn.Sequential(Attention()), torch.randn(2, 4)
    inject(net, LoRA(r=2, target_modules=["to_q", "to_k"]))
    net[0].fuse()
    with pytest.warns(UserWarning, match=r"first '0\.to_q'"):
        net(x)
    with pytest.raises(NotApplicableError, match="2 of them have not run since"):
        merge(net)


def test_what_is_added_beside_and_changes_nothing_is_no_harm() -> None:
    net, x = nn.Sequential(Attention()), torch.randn(2, 4)
    inject(net, LoRA(r=2))
    net[0].dropout = nn.Dropout()
    net.head = nn.Linear(4, 4)
    net[0].later = None
    expected = net(x)
    net[0].other = nn.Linear(4, 4)
    with pytest.raises(NotApplicableError, match="run one batch"):
        merge(net)
    net(x)
    merge(net)
    torch.testing.assert_close(net(x), expected)


def test_branches_and_experts_that_other_inputs_take_are_merged() -> None:
    net, x = Branches(), torch.randn(2, 4)
    inject(net, LoRA(r=2))
    with pytest.warns(UserWarning, match=r"of Branches: 1, first 'image\.0'.*unless they run for other inputs"):
        net(x)
    merge(net)


def test_nothing_is_said_of_experts_without_tokens() -> None:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    net = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    inject(net, LoRA(r=2))
    net(torch.ones(1, 2, dtype=torch.long))


def test_a_layer_whose_forward_is_called_past_its_hooks_is_told() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.fc.forward(x))

    net = nn.Sequential(Past())
    inject(net, LoRA(r=2))
    with pytest.warns(UserWarning, match=r"first '0\.fc'"):
        net(torch.randn(2, 4))


def test_each_adapter_is_looked_at_when_it_first_acts() -> None:
    net, x = nn.Sequential(Attention()), torch.randn(2, 4)
    net[0].fuse()
    inject(net, LoRA(r=2, target_modules=["to_out"]), "out")
    net(x)
    inject(net, LoRA(r=2, target_modules=["to_q"]), "query")
    activate(net, "out")
    net(x)
    activate(net, "query")
    with pytest.warns(UserWarning, match=r"first '0\.to_q'"):
        net(x)
    activate(net, "out")
    net(x)
    merge(net, "out")
    remove(net, "query")
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "inside"])
def test_compiled_code_is_not_judged(whole: bool) -> None:
    net, x = nn.Sequential(Attention(), nn.Linear(4, 4)), torch.randn(2, 4)
    expected = net(x)
    inject(net, LoRA(r=2))
    run = torch.compile(net, backend="eager") if whole else net
    if not whole:
        net[0].compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x), expected)
    merge(net)


def test_parts_that_hand_on_and_tied_copies_have_nothing_to_tell() -> None:
    net = bert().eval()
    inject(net, LoRA(r=2, modules_to_save=["classifier", "word_embeddings"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.ones(1, 3, dtype=torch.long))
