"""The command as a user types it, on a tiny real model; and every YAML in ``configs/``."""

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from echo_texts import save_model
from project import OnPEFTModule, Project
from snapshot import assert_identical

from lightning_peft import load_from_checkpoint
from lightning_peft.cli.parser import PEFTCLI, main
from lightning_peft.training.tasks.causal_lm import CausalLM
from lightning_peft.training.tasks.classification import TextClassifier
from lightning_peft.training.tasks.seq2seq import Seq2SeqLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The arguments of pytest are not those of the command, and its working directory is no place to write."""
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tiny_text_model: Path, sentiment_csv: Path, tmp_path: Path) -> Path:
    settings = {
        "seed_everything": 0,
        "model": {"class_path": "TextClassifier", "init_args": {"model": str(tiny_text_model), "lr": 0.01}},
        "data": {
            "class_path": "TextClassificationData",
            "init_args": {
                "tokenizer": str(tiny_text_model),
                "path": str(sentiment_csv),
                "validation_split": 8,
                "test_split": 8,
                "batch_size": 8,
                "max_length": 16,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(tmp_path / "out"), "filename": "task"},
                }
            ],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def run(*arguments: Any) -> PEFTCLI:
    return PEFTCLI([str(argument) for argument in arguments])


@pytest.mark.compat
def test_fit_test_and_predict_from_the_adapter_checkpoint(config, tmp_path, capsys):
    run("fit", "--config", config, "--peft.method.r", 2, "--trainer.max_epochs", 6)
    shown = capsys.readouterr().out
    assert "LoRA" in shown
    checkpoint = torch.load(tmp_path / "out/task.ckpt", weights_only=True)
    assert checkpoint["lightning_peft"]["adapters"][":default"]["method"]["r"] == 2
    assert all(".peft." in key for key in checkpoint["state_dict"])

    # Nothing is said of the method: r=2 comes from the file, not from the default of r=8.
    tested = run("test", "--config", config, "--ckpt_path", tmp_path / "out/task.ckpt")
    assert tested.trainer.callback_metrics["test_accuracy"] == 1.0
    run("predict", "--config", config, "--ckpt_path", tmp_path / "out/task.ckpt")
    assert "8 of 8 predictions" in capsys.readouterr().out


@pytest.mark.parametrize("named", ["argument", "file", "config"])
def test_another_method_starts_from_its_own_defaults(config, tmp_path, capsys, named):
    settings = yaml.safe_load(config.read_text())
    fields = {"r": 3, "target_modules": "all-linear", "layers": [-1], "dropout": 0.5}
    settings["peft"] = {"method": {"class_path": "LoRA", "init_args": fields}}
    other = {"class_path": "BottleneckAdapter", "init_args": {"preset": "pfeiffer"}}
    arguments = ["--peft.method", "BottleneckAdapter", "--peft.method.preset", "pfeiffer"]
    if named == "file":
        (tmp_path / "method.yaml").write_text(yaml.safe_dump(other))
        arguments = [f"--peft.method={tmp_path}/method.yaml"]
    if named == "config":  # over the default, LoRA
        settings["peft"], arguments = {"method": other}, []
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        run("fit", "--config", tmp_path / "other.yaml", *arguments, "--print_config")
    method = yaml.safe_load(capsys.readouterr().out)["peft"]["method"]["init_args"]
    assert method["preset"] == "pfeiffer"
    assert method["target_modules"] is method["layers"] is None
    assert method["dropout"] == 0.0


def test_a_method_made_of_methods_is_taken_from_the_checkpoint(config, tmp_path, capsys):
    parts = [{"class_path": "IA3"}, {"class_path": "PromptTuning", "init_args": {"num_virtual_tokens": 3}}]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"class_path": "Combine", "init_args": {"methods": parts}}))
    run("fit", "--config", config, "--peft.method", tmp_path / "both.yaml")
    tested = run("test", "--config", config, "--ckpt_path", tmp_path / "out/task.ckpt")
    keys = [key for key in tested.model.state_dict() if ".peft." in key]
    assert any(key.endswith("default:0.ia3_l") for key in keys)
    assert sum("embedding" in key and "default:1" in key for key in keys) == 1


def test_the_method_may_be_named_or_come_from_a_file_or_be_null(config, tmp_path):
    (tmp_path / "method.yaml").write_text("class_path: LoRA\ninit_args: {r: 3, target_modules: [query, value]}\n")
    named = run("fit", "--config", config, "--peft.method", "LoRA", "--peft.method.r", 4, "--trainer.fast_dev_run", 1)
    assert named.model.state_dict()["model.bert.pooler.dense.peft.default.lora_A"].shape[0] == 4
    filed = run("fit", "--config", config, "--peft.method", tmp_path / "method.yaml", "--trainer.fast_dev_run", 1)
    adapted = {key for key in filed.model.state_dict() if key.endswith("lora_A")}
    place = "model.bert.encoder.layer.0.attention.self"
    assert adapted == {f"{place}.{name}.peft.default.lora_A" for name in ("query", "value")}
    full = run("fit", "--config", config, "--peft.method", "null", "--trainer.fast_dev_run", 1)
    assert all(parameter.requires_grad for parameter in full.model.parameters())
    assert not any(".peft." in key for key in full.model.state_dict())


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "bf16-true"])
def test_precision_reaches_the_trainer_and_adapters_stay_fp32(config, precision):
    cli = run("fit", "--config", config, "--trainer.precision", precision, "--trainer.fast_dev_run", 2)
    assert cli.trainer.precision.startswith(precision)
    weight = cli.model.model.bert.pooler.dense.weight
    assert weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert cli.model.model.bert.pooler.dense.peft.default.lora_A.dtype == torch.float32


def test_the_optimizer_of_the_command_line_holds_exactly_what_trains(config):
    cli = run(
        *("fit", "--config", config, "--trainer.fast_dev_run", 2),
        *("--optimizer", "SGD", "--optimizer.lr", 0.5, "--lr_scheduler", "StepLR", "--lr_scheduler.step_size", 1),
    )
    [optimizer] = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in cli.model.parameters() if p.requires_grad}
    assert len(held) > 0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)  # StepLR, after an epoch


@pytest.mark.compat
@pytest.mark.parametrize("task", [CausalLM, Seq2SeqLM])
def test_language_models_are_trained_and_write_by_command(task, tmp_path, capsys):
    build, kind = {CausalLM: (tiny_models.llama, "causal"), Seq2SeqLM: (tiny_models.t5, "seq2seq")}[task]
    folder = save_model(tmp_path / "model", build)
    common = ["--model", task.__name__, "--model.model", folder, "--data", "echo_texts.Echo", "--data.kind", kind]
    common += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    common += ["--trainer.enable_checkpointing", "false", "--trainer.log_every_n_steps", 1, "--seed_everything", 0]
    fitted = run("fit", *common, "--model.max_new_tokens", 3, "--peft.method.r", 2, "--trainer.max_epochs", 1)
    fitted.trainer.save_checkpoint(tmp_path / "task.ckpt")
    assert "Samples" in capsys.readouterr().out
    loaded = task.load_from_checkpoint(tmp_path / "task.ckpt")
    assert loaded.max_new_tokens == 3
    for key, tensor in fitted.model.state_dict().items():
        assert_identical(loaded.state_dict()[key], tensor, key)
    # The model's arguments come from the file.
    written = run("predict", *common, "--ckpt_path", tmp_path / "task.ckpt")
    assert "20 of 32 predictions" in capsys.readouterr().out
    assert written.model.max_new_tokens == 3


def test_resuming_by_command_continues(config, tmp_path):
    run("fit", "--config", config)
    (tmp_path / "out/task.ckpt").rename(tmp_path / "half.ckpt")
    cli = run("fit", "--config", config, "--ckpt_path", tmp_path / "half.ckpt", "--trainer.max_epochs", 2)
    assert cli.trainer.current_epoch == 2


@pytest.mark.parametrize("project", [Project, OnPEFTModule])
def test_files_of_the_command_load_by_class_with_their_hyperparameters(project, tmp_path):
    command = run(
        *("fit", "--seed_everything", 0, "--model", f"project.{project.__name__}", "--model.init_args.lr", 0.02),
        *("--data", "project.ProjectData", "--peft.method", "LoRA", "--peft.method.r", 4, "--trainer.max_epochs", 1),
        *("--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"),
        *("--trainer.enable_checkpointing", "false", "--trainer.log_every_n_steps", 1),
    )
    command.trainer.save_checkpoint(tmp_path / "task.ckpt")
    loads = [lambda path: load_from_checkpoint(project, path)]
    loads += [project.load_from_checkpoint] if project is OnPEFTModule else []
    x = torch.randn(4, 16)
    for load in loads:
        loaded = load(tmp_path / "task.ckpt")
        assert loaded.hparams["lr"] == 0.02
        assert_identical(loaded.eval()(x), command.model.eval()(x))


def test_what_a_checkpoint_holds_and_the_mode_of_the_base_are_options_of_the_command(config, tmp_path):
    command = run("fit", "--config", config, "--peft.checkpoint", "merged", "--peft.frozen_mode", "eval")
    assert not command.model.model.bert.encoder.training
    (tmp_path / "out/task.ckpt").rename(tmp_path / "merged.ckpt")
    merged = TextClassifier.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert not any(".peft." in key for key in merged.state_dict())
    run("fit", "--config", config, "--peft.base_weights", tmp_path / "merged.ckpt", "--trainer.fast_dev_run", 1)


def test_a_method_that_contradicts_the_file_is_an_error(config, tmp_path, capsys):
    run("fit", "--config", config)
    with pytest.raises(SystemExit, match="1"):
        main(["test", f"--config={config}", f"--ckpt_path={tmp_path}/out/task.ckpt", "--peft.method.r=4"])
    assert "CheckpointError: Adapter 'default' of the file is another one: r is 8 in the file and 4 here" in (
        capsys.readouterr().err
    )


def test_errors_are_one_message_without_a_traceback(config, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["fit", f"--config={config}", "--peft.method.target_modules=[quer]"])
    error = capsys.readouterr().err
    assert "TargetError: target_modules: 'quer' matches no layer. Did you mean 'query'" in error
    assert "Traceback" not in error
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(SystemExit, match="1"):
        main(["test", f"--config={config}", f"--ckpt_path={tmp_path}/broken.ckpt"])
    assert "CheckpointError" in capsys.readouterr().err


def test_a_damaged_record_is_one_message_too(config, tmp_path, capsys):
    for damaged in (
        3,
        {"version": 1, "adapters": [1]},
        {"version": 1, "adapters": {"": {"path": "", "name": "default"}}},
    ):
        checkpoint = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "lightning_peft": damaged}
        torch.save(checkpoint, tmp_path / "damaged.ckpt")
        with pytest.raises(SystemExit, match="1"):
            main(["test", f"--config={config}", f"--ckpt_path={tmp_path}/damaged.ckpt"])
        assert "CheckpointError: The 'lightning_peft' record of this file is damaged" in capsys.readouterr().err


def test_a_field_out_of_range_is_a_readable_usage_error(config, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["fit", f"--config={config}", "--peft.method.r=0"])
    error = capsys.readouterr().err
    assert "ConfigError: LoRA.r must be at least 1 and whole, not 0." in error
    assert "Traceback" not in error


def test_an_unknown_method_or_field_is_answered_with_those_there_are(config, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", f"--config={config}", "--peft.method=LORA"])
    error = capsys.readouterr().err
    assert "Did you mean 'LoRA'?" in error
    assert error.startswith("usage: ")
    assert len(error.splitlines()) < 20
    with pytest.raises(SystemExit, match="2"):
        main(["fit", f"--config={config}", "--peft.method.rank=3"])
    assert "Option 'rank' is not accepted" in capsys.readouterr().err


def test_the_help_of_a_method_explains_its_fields(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--peft.method.help=LoRA"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Rank of the update; above" in shown
    assert "(type: int, at least 1 and whole, default: 8)" in shown
    assert "Layers to adapt:" in shown


@pytest.mark.compat
@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_opens_with_a_command_that_parses(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# lightning-peft "), "a config opens with the command that runs it"
    command = first.removeprefix("# lightning-peft ").split()
    assert str(path.relative_to(ROOT)) in command
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]
