"""Modules of several networks: adapters go where they were asked for, and what trains is trained as by hand."""

import copy
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from snapshot import assert_identical
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from lightning_peft import LoRA, PEFTCallback
from lightning_peft.errors import GradientError, OptimizerError

METHOD = LoRA(r=2, target_modules=[r"generator\.\d"], modules_to_save=["discriminator"])


def build_networks() -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        generator = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 16))
        return generator, nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 1))


class GAN(L.LightningModule):
    """As users write it: two optimizers, and a generator that has its turn after every third batch of the run."""

    generator_uses = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = build_networks()
        self.batches = 0

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.AdamW(network.parameters(), lr=0.01) for network in networks]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        of_generator, of_discriminator = self.optimizers()
        x = batch[0]
        self.batches += 1
        self.toggle_optimizer(of_discriminator)
        self.step(of_discriminator, self.judge(x, 1.0) + self.judge(self.make(x).detach(), 0.0))
        self.untoggle_optimizer(of_discriminator)
        if self.batches % 3 == 0:
            self.toggle_optimizer(of_generator)
            self.step(of_generator, self.judge(self.make(x), 1.0))
            self.untoggle_optimizer(of_generator)

    def step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def make(self, x: Tensor) -> Tensor:
        return self.generator(x[:, :4])

    def judge(self, x: Tensor, truth: float) -> Tensor:
        scores = self.discriminator(x)
        return bce(scores, torch.full_like(scores, truth))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches"] = self.batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches = checkpoint["batches"]


class ByHand(nn.Module):
    """A frozen linear layer with LoRA beside it, whose factors are those of ``adapter``."""

    def __init__(self, linear: nn.Linear, adapter: nn.Module) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora_A = nn.Parameter(adapter.lora_A.detach().clone())
        self.lora_B = nn.Parameter(adapter.lora_B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + METHOD.alpha / METHOD.r * x @ self.lora_A.T @ self.lora_B.T


class CopyAtStart(L.Callback):
    """The module as it is when training starts."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.generator = copy.deepcopy(pl_module.generator)


def train_by_hand(start: nn.Module, batches: Iterator[Tensor]) -> tuple[nn.Module, nn.Module]:
    generator, discriminator = build_networks()
    for place in (0, 2):
        generator[place] = ByHand(generator[place], start[place].peft.default)
    trained = [p for p in generator.parameters() if p.requires_grad]
    of_generator = torch.optim.AdamW(trained, lr=0.01)
    of_discriminator = torch.optim.AdamW(discriminator.parameters(), lr=0.01)
    for count, x in enumerate(batches, start=1):
        real, fake = discriminator(x), discriminator(generator(x[:, :4]).detach())
        of_discriminator.zero_grad()
        (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))).backward()
        of_discriminator.step()
        if count % 3 == 0:
            fake = discriminator(generator(x[:, :4]))
            of_generator.zero_grad()
            bce(fake, torch.ones_like(fake)).backward()
            of_generator.step()
    return generator, discriminator


def peft(method: LoRA = METHOD) -> PEFTCallback:
    return PEFTCallback(method, show=False)


def test_a_gan_trains_as_by_hand_the_generator_by_adapters_the_discriminator_whole(data, trainer):
    model, start = GAN(), CopyAtStart()
    trainer(peft(), start, max_epochs=3).fit(model, data)
    generator, discriminator = train_by_hand(start.generator, (x for _ in range(3) for x, _ in data))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"generator.{i}.peft.default.lora_{x}" for i in (0, 2) for x in "AB"} | {
        f"discriminator.{i}.peft.default.{x}" for i in (0, 2) for x in ("weight", "bias")
    }
    for place in (0, 2):
        for name in ("lora_A", "lora_B"):
            found = getattr(model.generator[place].peft.default, name)
            assert not torch.equal(found, getattr(start.generator[place].peft.default, name))
            torch.testing.assert_close(found, getattr(generator[place], name), rtol=1e-4, atol=1e-5)
        for name in ("weight", "bias"):
            found = getattr(model.discriminator[place].peft.default, name)
            torch.testing.assert_close(found, getattr(discriminator[place], name), rtol=1e-4, atol=1e-5)
    for network, before in zip((model.generator, model.discriminator), build_networks(), strict=True):
        for key, tensor in before.state_dict().items():
            assert_identical(network.state_dict()[key], tensor, key)


def test_a_gan_resumes_from_what_trains_alone_and_ends_bit_equal(data, trainer, tmp_path):
    def fit(epochs: int, **ckpt: Any) -> GAN:
        torch.manual_seed(7)
        model, keeps = GAN(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
        trainer(peft(), *([] if ckpt else [keeps]), max_epochs=epochs).fit(model, data, **ckpt)
        return model

    straight = fit(3)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert len(saved["state_dict"]) == 8
    assert all(".peft.default." in key for key in saved["state_dict"])
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        resumed = fit(3, ckpt_path=tmp_path / "epoch=0.ckpt")
    for key, tensor in straight.state_dict().items():
        assert_identical(resumed.state_dict()[key], tensor, key)


@pytest.mark.parametrize("batches", [1, 2])
def test_an_optimizer_whose_turn_is_still_to_come_is_no_error(batches, data, trainer):
    """With two batches an epoch, the generator's first turn is in the second epoch."""
    model, start = GAN(), CopyAtStart()
    trainer(peft(), start, max_epochs=2, limit_train_batches=batches).fit(model, data)
    trained = not torch.equal(model.generator[0].peft.default.lora_B, start.generator[0].peft.default.lora_B)
    assert trained is (batches == 2)
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters() if p.requires_grad]
    assert not any(hooks)  # nothing goes on watching


def test_an_optimizer_that_steps_adapters_without_gradient_is_an_error(data, trainer):
    class Detached(GAN):
        def toggle_optimizer(self, optimizer: Any) -> None: ...

        def untoggle_optimizer(self, optimizer: Any) -> None: ...

        def make(self, x: Tensor) -> Tensor:
            return super().make(x).detach()

    model = Detached()
    with pytest.raises(GradientError, match=r"at 2 of its layers, first 'generator\.0'"):
        trainer(peft(), max_epochs=3).fit(model, data)
    assert model.batches == 4  # the first epoch


@pytest.mark.parametrize(("forgotten", "first"), [(0, "generator.0"), (1, "discriminator.0")])
def test_a_network_that_trains_in_no_optimizer_is_an_error_before_the_first_step(forgotten, first, data, trainer):
    class Forgetful(GAN):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return super().configure_optimizers()[1 - forgotten]

    model = Forgetful()
    with pytest.raises(OptimizerError, match=rf"4 of 8 .*'{first}\.peft\.default"):
        trainer(peft()).fit(model, data)
    assert model.batches == 0


def test_a_teacher_that_only_judges_is_named_unless_it_is_left_out(data, trainer):
    class Distilled(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = (nn.Sequential(nn.Linear(16, 8), nn.Tanh()) for _ in range(2))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with torch.no_grad():
                target = self.teacher(batch[0])
            return nn.functional.mse_loss(self.student(batch[0]), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    with pytest.raises(GradientError, match=r"exclude_modules=\['teacher\.0'\]"):
        trainer(peft(LoRA(r=2))).fit(Distilled(), data)
    model = Distilled()
    trainer(peft(LoRA(r=2, target_modules=[r"student\.0"]))).fit(model, data)
    assert not any("teacher" in name for name, p in model.named_parameters() if p.requires_grad)
    assert model.student[0].peft.default.lora_B.any()
