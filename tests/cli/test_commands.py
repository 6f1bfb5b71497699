"""The command's own subcommands: export, import, merge, inspect; and ``fit`` that goes on from an adapter."""

import re
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
import yaml
from project import Project
from snapshot import assert_identical
from torch import Tensor, nn

from lightning_peft import load_from_checkpoint
from lightning_peft.cli.parser import PEFTCLI, main
from lightning_peft.training.tasks.classification import TextClassifier


@pytest.fixture
def trained(tiny_text_model: Path, sentiment_csv: Path, tmp_path: Path, monkeypatch) -> tuple[Path, Path]:
    """A config file, and the checkpoint that ``fit`` made with it."""
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.chdir(tmp_path)
    data = {"tokenizer": str(tiny_text_model), "path": str(sentiment_csv), "validation_split": 8, "test_split": 8}
    settings = {
        "seed_everything": 0,
        "model": {"class_path": "TextClassifier", "init_args": {"model": str(tiny_text_model), "lr": 0.01}},
        "data": {"class_path": "TextClassificationData", "init_args": {**data, "batch_size": 8, "max_length": 16}},
        "peft": {"method": {"class_path": "LoRA", "init_args": {"r": 3}}, "show": False},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    cli = PEFTCLI(["fit", "--config", str(tmp_path / "run.yaml")])
    cli.trainer.save_checkpoint(tmp_path / "task.ckpt")
    return tmp_path / "run.yaml", tmp_path / "task.ckpt"


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network.eval()(input_ids=torch.tensor([[5, 6, 7], [8, 9, 4]])).logits


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in peft
def test_an_exported_adapter_serves_in_peft_and_comes_back_as_a_checkpoint(trained, tiny_text_model, capsys) -> None:
    config, checkpoint = trained
    expected = logits(TextClassifier.load_from_checkpoint(checkpoint).model)
    main(["export", f"--config={config}", f"--ckpt_path={checkpoint}", "--output=adapter"])
    assert "LoRA" in capsys.readouterr().out
    base = hf.AutoModelForSequenceClassification.from_pretrained(tiny_text_model)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base, "adapter")), expected, rtol=1e-5, atol=1e-5)
    main(["import", f"--config={config}", "--path=adapter", "--output=back.ckpt"])
    assert f"back.ckpt: {Path('back.ckpt').stat().st_size:,} bytes" in capsys.readouterr().out
    assert_identical(logits(TextClassifier.load_from_checkpoint("back.ckpt").model), expected)


def test_a_merged_model_is_a_plain_directory_of_transformers_or_a_plain_checkpoint(trained, capsys) -> None:
    config, checkpoint = trained
    expected = logits(TextClassifier.load_from_checkpoint(checkpoint).model)
    main(["merge", f"--config={config}", f"--ckpt_path={checkpoint}", "--output=merged"])
    shown = capsys.readouterr().out
    assert "merged: BertForSequenceClassification" in shown
    # What rounding has taken, weight by weight.
    assert re.search(r"weight\s+┃ dtype\s+┃ largest loss ┃ mean loss", shown)
    assert re.search(r"model\.bert\.encoder\.layer\.0\S*\s+│ float32 │\s+\d+\.\d\d% │\s+0\.00%", shown)
    assert not [path.name for path in Path("merged").iterdir() if "peft" in path.name or "adapter" in path.name]
    merged = hf.AutoModelForSequenceClassification.from_pretrained("merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert hf.AutoTokenizer.from_pretrained("merged")("a fine film").input_ids
    assert merged.config.id2label == {0: "bad", 1: "good"}
    main(["merge", f"--config={config}", f"--ckpt_path={checkpoint}", "--output=merged.ckpt"])
    assert "lightning_peft" not in torch.load("merged.ckpt", weights_only=True)
    plain = TextClassifier.load_from_checkpoint("merged.ckpt")
    torch.testing.assert_close(logits(plain.model), expected, rtol=1e-5, atol=1e-5)


def test_what_lies_in_a_file_is_shown_with_and_without_a_model(trained, capsys) -> None:
    config, checkpoint = trained
    main(["inspect", str(checkpoint)])
    shown = capsys.readouterr().out
    assert "LoRA: target_modules='all-linear', modules_to_save='auto', r=3" in " ".join(shown.replace("│", "").split())
    assert f"{checkpoint.stat().st_size:,} bytes" in shown
    main(["export", f"--config={config}", f"--ckpt_path={checkpoint}", "--output=adapter"])
    capsys.readouterr()
    main(["inspect", "adapter"])
    assert "Fits" not in capsys.readouterr().out
    main(["inspect", f"--config={config}", "--path=adapter"])
    assert re.search(r"Fits the model\s+│ yes", capsys.readouterr().out)
    for path, message in (("nowhere", "There is no"), ("run.yaml", "cannot be read")):
        with pytest.raises(SystemExit, match="1"):
            main(["inspect", path])
        assert message in capsys.readouterr().err


def test_a_module_without_a_transformers_model_is_merged_into_a_checkpoint(trained, capsys) -> None:
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    cli = PEFTCLI(
        ["fit", "--model=project.Project", "--data=project.ProjectData", "--seed_everything=0", "--peft.show=false"]
        + ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
        + [f"--trainer.{option}=false" for option in quiet]
    )
    cli.trainer.save_checkpoint("project.ckpt")
    arguments = ["merge", "--model=project.Project", "--ckpt_path=project.ckpt", "--seed_everything=0"]
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--output=merged"])
    assert "ends in .ckpt" in " ".join(capsys.readouterr().err.split())
    main([*arguments, "--output=merged.ckpt"])
    x = torch.randn(4, 16)
    expected = load_from_checkpoint(Project, "project.ckpt").eval()(x)
    torch.testing.assert_close(Project.load_from_checkpoint("merged.ckpt").eval()(x), expected, rtol=1e-5, atol=1e-5)


def test_the_command_goes_on_from_an_adapter_with_the_method_of_its_file(trained, capsys) -> None:
    config, checkpoint = trained
    settings = yaml.safe_load(config.read_text())
    del settings["peft"]
    Path("other.yaml").write_text(yaml.safe_dump(settings))
    cli = PEFTCLI(["fit", "--config", "other.yaml", "--peft.init_from", str(checkpoint), "--trainer.fast_dev_run", "1"])
    assert cli.model.state_dict()["model.bert.pooler.dense.peft.default.lora_A"].shape[0] == 3
