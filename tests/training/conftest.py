"""A project, its data, and a trainer that keeps quiet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from project import BuiltInConfigureModel, BuiltInSetup, Project
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, PEFTCallback


@pytest.fixture(params=[Project, BuiltInConfigureModel, BuiltInSetup])
def project(request: pytest.FixtureRequest) -> type[Project]:
    return request.param


@pytest.fixture
def data() -> DataLoader:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=random)
    return DataLoader(TensorDataset(x, x[:, :8].argmax(-1)), batch_size=16)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """A Trainer without screen output; any argument can be overridden."""

    def make(*callbacks: L.Callback, **options: Any) -> L.Trainer:
        quiet = {
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(callbacks=list(callbacks), **{**quiet, **options})

    return make


@pytest.fixture
def peft() -> PEFTCallback:
    return PEFTCallback(LoRA(r=4), show=False)
