"""Adapters that get no gradient, and adapted layers that do not run, are told before time is lost."""

import pytest
from project import Project
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import LoRA, PEFTCallback
from lightning_peft.errors import GradientError


def test_an_adapter_without_gradient_is_an_error_after_the_first_backward(data, trainer, peft):
    class Unused(Project):
        def build(self) -> None:
            super().build()
            self.spare = nn.Linear(16, 16)
            self.steps = 0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.steps += 1
            return super().training_step(batch, batch_idx)

    class UnusedBlock(Unused):
        def build(self) -> None:
            super().build()
            self.spare = nn.Sequential(nn.Linear(16, 16))

    with pytest.raises(GradientError, match=r"exclude_modules=\['spare\.0'\]"):  # not '0', which is in net, too
        trainer(PEFTCallback(LoRA(r=4), show=False)).fit(UnusedBlock(), data, data)
    model = Unused()
    with pytest.raises(GradientError, match=r"'spare': that layer did not run.*exclude_modules=\['spare'\]"):
        trainer(peft).fit(model, data, data)
    assert model.steps == 1
    trainer(PEFTCallback(LoRA(r=4, exclude_modules=["spare"]), show=False)).fit(Unused(), data, data)


def test_an_output_that_is_detached_is_told_from_a_layer_that_did_not_run(data, trainer, peft):
    class Detaching(Project):
        def build(self) -> None:
            super().build()
            self.spare = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.spare(x).detach())

    with pytest.raises(GradientError, match=r"'spare': the loss does not depend on that layer's output"):
        trainer(peft).fit(Detaching(), data, data)


@pytest.mark.parametrize("called", [False, True])
def test_a_loss_without_any_adapter_is_an_error_before_the_first_backward(data, trainer, peft, called):
    class Elsewhere(Project):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if called:
                self(batch[0])
            return batch[0].square().mean()

    reason = "does not depend on" if called else "did not run"
    with pytest.raises(GradientError, match=rf"at 3 of its layers, first 'net\.0': .*{reason}"):
        trainer(peft, num_sanity_val_steps=0).fit(Elsewhere(), data, data)


def test_where_nothing_trains_a_layer_that_did_not_run_is_a_warning_once(data, trainer):
    class Unused(Project):
        def build(self) -> None:
            super().build()
            self.spare = nn.Linear(16, 16)

    for stage in ("validate", "test", "predict"):
        with pytest.warns(UserWarning, match=r"have not run in a forward of Unused: 1, first 'spare'") as told:
            getattr(trainer(PEFTCallback(LoRA(r=4), show=False)), stage)(Unused(), data)
        assert sum("have not run" in str(warning.message) for warning in told) == 1


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch's own hint of it
def test_reentrant_checkpointing_of_a_frozen_base_is_an_error_and_the_other_kind_trains(data, trainer):
    class Checkpointed(Project):
        def forward(self, x: Tensor) -> Tensor:
            return self.net[5](checkpoint(self.net[:5], x, use_reentrant=self.reentrant))

    for reentrant in (True, False):
        model = Checkpointed()
        model.reentrant = reentrant
        fitting = trainer(PEFTCallback(LoRA(r=4), show=False))
        if reentrant:
            with pytest.raises(GradientError, match=r"2 of its layers, first 'net\.0'.*does not depend"):
                fitting.fit(model, data, data)
        else:
            fitting.fit(model, data, data)
            assert model.net[0].peft.default.lora_B.abs().sum() > 0


def test_in_manual_optimization_all_backwards_of_the_first_step_count(data, trainer, peft):
    class TwoLosses(Project):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(16, 8)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            if self.use_other:
                self.manual_backward(nn.functional.cross_entropy(self.other(batch[0]), batch[1]))
            optimizer.step()

    model = TwoLosses()
    model.use_other = True
    trainer(peft).fit(model, data, data)
    lazy = TwoLosses()
    lazy.use_other = False
    with pytest.raises(GradientError, match="'other'"):
        trainer(PEFTCallback(LoRA(r=4), show=False)).fit(lazy, data, data)
