"""What a layer's class computes with its weight is read off its source."""

import pytest
import torch
import torch.nn.functional as F
from perturbation import adapted
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4Router

from lightning_peft import DoRA, LoRA, inject, merge
from lightning_peft.errors import NotApplicableError
from lightning_peft.network.forwards import has_known_forward, scaling_attribute
from lightning_peft.network.hosts import weights_of


class Same(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        """The layer, in other words."""
        return F.linear(features, self.weight, self.bias)


class Above(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Passed(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Padded(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0)))


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (nn.Linear(2, 2), True),
        (Same(2, 2), True),
        (Above(2, 2), True),
        (FalconLinear(2, 2), True),
        (Doubled(2, 2), False),
        (Cosine(2, 2), False),
        (nn.Conv2d(2, 2, 1), True),
        (Passed(2, 2, 1), True),
        (Padded(2, 2, 2), False),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_torchs_layer_computes_is_known(module: nn.Module, known: bool) -> None:
    kind = next(kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d) if isinstance(module, kind))
    assert has_known_forward(module, kind) is known
    (weight,) = weights_of(module)
    assert weight.weight_only is not known


def test_a_scale_is_known_by_its_name() -> None:
    assert scaling_attribute(Gemma3TextScaledWordEmbedding.forward) == "embed_scale"
    assert scaling_attribute(Doubled.forward) is None
    assert scaling_attribute(Same.forward) is None


@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(r=2)])
@pytest.mark.parametrize("kind", [Same, FalconLinear, Doubled, Cosine])
def test_unmerged_equals_merged_and_plain_torch(kind: type[nn.Linear], method: LoRA) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), kind(4, 5)), torch.randn(6, 3)
    adapted(net, method)
    expected = net(x)
    merge(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_a_router_that_puts_out_two_things_is_adapted_by_its_weight() -> None:
    class Config:
        hidden_size, num_local_experts, num_experts_per_tok = 4, 3, 1

    net, x = nn.Sequential(Llama4Router(Config())), torch.randn(5, 4)
    inject(net, LoRA(r=2))
    nn.init.normal_(net[0].peft.default.lora_B)
    expected = net(x)
    assert not torch.equal(expected[1], nn.functional.linear(x, net[0].weight))
    merge(net)
    torch.testing.assert_close(net(x), expected)


def test_what_has_no_input_of_its_own_has_none_to_drop_from() -> None:
    with pytest.raises(NotApplicableError, match=r"LoRA\.dropout=0\.1 cannot act on '0': Doubled, or a module above"):
        inject(nn.Sequential(Doubled(2, 2)), LoRA(r=2, dropout=0.1))
