"""Every code block of the README runs; every command and YAML in it parses."""

import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from project import Project
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.cli.parser import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


class Numbers(L.LightningDataModule):
    """Stands for the reader's data."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(32, 16), torch.randint(0, 8, (32,))), batch_size=16)

    val_dataloader = test_dataloader = train_dataloader


def test_the_python_blocks_run_in_the_order_of_the_page(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Trainer = L.Trainer
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    monkeypatch.setattr(L, "Trainer", lambda **given: Trainer(accelerator="cpu", log_every_n_steps=1, **quiet, **given))
    # The reader's own module and data; all else the page must bring itself.
    names = {"MyModule": Project, "datamodule": Numbers()}
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert type(names["network"]) is Project
    assert (tmp_path / "task.ckpt").stat().st_size < 50_000


def test_the_commands_parse(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = line.replace('"', "").split()
        if program == "make":
            subprocess.run(["make", "--dry-run", *arguments], check=True, capture_output=True)
        else:
            assert program == "lightning-peft"
            with pytest.raises(SystemExit, match="0"):
                main([*arguments, "--print_config"])
            assert yaml.safe_load(capsys.readouterr().out)["model"]


def test_the_yaml_blocks_parse(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    assert blocks("yaml")
    for block in blocks("yaml"):
        (tmp_path / "block.yaml").write_text(block)
        with pytest.raises(SystemExit, match="0"):
            main(["fit", f"--config={tmp_path}/block.yaml", "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["peft"]["method"]["class_path"].endswith("LoRA")


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_comparison_has_every_method_of_configs():
    table = README.partition("<!-- comparison -->")[2].partition("<!-- /comparison -->")[0]
    rows = re.findall(
        r"^\| \[(\w+)\]\(configs/methods/\1\.yaml\) \| [\d,]+ \| \S+ \| (0\.\d{3}) \|$", table, re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == sorted(path.stem for path in (ROOT / "configs/methods").glob("*.yaml"))
