"""Runs of a Trainer on quantized bases, and models that transformers itself quantizes when it loads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny_models
import torch
from project import Project
from quantizing import OWN, PACKAGES, quantize
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTCallback, load_adapter, load_from_checkpoint, merge, save_adapter
from lightning_peft.cli.commands import CommandTrainer


class QuantizedProject(Project):
    def __init__(self, scheme: str = "", lr: float = 1e-2) -> None:
        super().__init__(lr)
        if scheme:
            self.net = quantize(self.net, scheme)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("scheme", [OWN, *PACKAGES])
def test_a_run_trains_saves_resumes_and_loads_the_adapter(scheme, precision, data, trainer, tmp_path) -> None:
    model, again = QuantizedProject(scheme), QuantizedProject(scheme)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}
    run = trainer(PEFTCallback(LoRA(r=4), show=False), precision=precision)
    run.fit(model, data, data)
    run.save_checkpoint(path := tmp_path / "task.ckpt")
    file = torch.load(path, weights_only=True)["state_dict"]
    assert all(".peft." in key for key in file)
    assert {tensor.dtype for tensor in file.values()} == {torch.float32}
    assert all(tensor.any() for tensor in file.values()), "B did not leave zero"
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.items())

    trainer(PEFTCallback(LoRA(r=4), show=False), precision=precision, max_epochs=2).fit(
        again, data, data, ckpt_path=path
    )
    assert any(not torch.equal(again.state_dict()[key], tensor) for key, tensor in file.items())
    for loaded in (
        load_from_checkpoint(QuantizedProject, path, scheme=scheme),
        load_from_checkpoint(Project, path),
    ):
        found = {key: tensor for key, tensor in loaded.state_dict().items() if ".peft." in key}
        torch.testing.assert_close(found, file, rtol=0, atol=0)


def test_the_command_merges_into_a_plain_model(data, trainer, tmp_path: Path) -> None:
    model = QuantizedProject(OWN)
    run = trainer(PEFTCallback(LoRA(r=4), show=False))
    run.fit(model, data, data)
    run.save_checkpoint(tmp_path / "task.ckpt")
    command = CommandTrainer(accelerator="cpu", logger=False)
    command.merge(QuantizedProject(OWN), str(tmp_path / "task.ckpt"), str(tmp_path / "merged.ckpt"), dequantize=True)
    merged, x = Project.load_from_checkpoint(tmp_path / "merged.ckpt").eval(), next(iter(data))[0]
    torch.testing.assert_close(merged(x), model.eval()(x), rtol=1e-4, atol=1e-5)


# Models of transformers ----------------------------------------------------------------------------------------------


def _four_bits() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _eight_bits() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao() -> Any:
    from transformers import TorchAoConfig

    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


CONFIGS = {"bitsandbytes nf4": _four_bits, "bitsandbytes int8": _eight_bits, "torchao int8": _torchao}


class LanguageModel(L.LightningModule):
    """A language model read from a directory, quantized as it is read."""

    def __init__(self, path: str, quantization: str = "") -> None:
        super().__init__()
        self.save_hyperparameters()
        from transformers import AutoModelForCausalLM

        config = CONFIGS[quantization]() if quantization else None
        self.net = AutoModelForCausalLM.from_pretrained(path, quantization_config=config).train()

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids).logits

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        return self.net(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.fixture(params=CONFIGS)
def quantization(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param.split()[0])
    pytest.importorskip("accelerate")  # transformers quantizes with its help
    return request.param


@pytest.fixture
def llama(tmp_path: Path) -> str:
    tiny_models.llama(hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_a_language_model_is_adapted_in_few_bits_and_merged(
    quantization: str, llama: str, trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    ids = torch.randint(1, tiny_models.VOCABULARY, (2, 6))
    model = LanguageModel(llama, quantization)
    run = trainer(PEFTCallback(LoRA(r=4), show=False))
    run.fit(model, DataLoader([ids] * 3, batch_size=None))
    run.save_checkpoint(path := tmp_path / "task.ckpt")
    again, plain = load_from_checkpoint(LanguageModel, path), load_from_checkpoint(LanguageModel, path, quantization="")
    assert torch.equal(again.eval()(ids), model.eval()(ids))
    assert not plain.net.config.to_dict().get("quantization_config")

    save_adapter(model, tmp_path / "adapter")
    load_adapter(LanguageModel(llama), tmp_path / "adapter")
    expected = model.train()(ids)
    merge(model, dequantize=True)
    torch.testing.assert_close(model(ids), expected, rtol=1e-3, atol=1e-3)
    model.net.save_pretrained(tmp_path / "merged")
    plain = LanguageModel(str(tmp_path / "merged")).eval()
    torch.testing.assert_close(plain(ids), model.eval()(ids), rtol=1e-5, atol=1e-5)
