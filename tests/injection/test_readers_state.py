"""What a forward that reads weights below it sets, makes and hooks is kept where it belongs."""

import pytest
import torch
import torch.nn.functional as F
from perturbation import adapted
from torch import Tensor, nn

from lightning_peft import (
    LoRA,
    inject,
    merge,
)
from lightning_peft.errors import NotApplicableError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Reader(nn.Module):
    """Calls its layer and reads it, each as somebody's code does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.fc.weight)


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
