"""The command ``lightning-peft``: LightningCLI with a PEFT method under ``--peft``."""

import logging
import re
import sys
import warnings
from collections.abc import Mapping
from functools import partial, update_wrapper
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

import lightning as L
import rich
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, instantiate_class
from rich.table import Table
from typing_extensions import override

from lightning_peft.checkpoints.ckpt import METADATA_KEY, methods_in
from lightning_peft.cli.commands import COMMANDS, CommandTrainer, show_file
from lightning_peft.core.method import registered_methods
from lightning_peft.data import TextClassificationData
from lightning_peft.errors import PEFTError, did_you_mean
from lightning_peft.methods import LoRA  # type: ignore[attr-defined]
from lightning_peft.training.callback import PEFTCallback
from lightning_peft.training.files import read_checkpoint
from lightning_peft.training.forgetting import ForgettingMonitor
from lightning_peft.training.tasks.causal_lm import CausalLM
from lightning_peft.training.tasks.classification import TextClassifier
from lightning_peft.training.tasks.seq2seq import Seq2SeqLM

# Imported so that their short names work on the command line: --model TextClassifier --data TextClassificationData.
__all__ = ["PEFTCLI", "CausalLM", "ForgettingMonitor", "Seq2SeqLM", "TextClassificationData", "TextClassifier", "main"]

# So that --peft.method.help METHOD shows what each field means.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class PEFTArgumentParser(LightningArgumentParser):
    """A parser whose complaints fit on a screen: the sixty options are left to ``--help``."""

    @override
    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        # To name a method is to start from its own defaults: jsonargparse would keep what the last one was given
        # where the names of fields agree. Null in between makes it forget.
        given = sys.argv[1:] if args is None else args
        if isinstance(given, (list, tuple)):
            names = re.compile(r"--peft\.method(=.*)?")
            args = [a for arg in given for a in (["--peft.method=null", arg] if names.fullmatch(str(arg)) else [arg])]
        return super().parse_args(args, *rest, **kwargs)

    @override
    def format_help(self, *args: Any) -> str:
        """Help in which the conditions of a field stand behind its type, as words."""
        text = super().format_help(*args)
        while (start := text.find("Annotated[")) >= 0:
            depth, end = 1, start + len("Annotated[")
            while depth:
                depth += {"[": 1, "]": -1}.get(text[end], 0)
                end += 1
            text = text[:start] + text[start + len("Annotated[") : end - 1] + text[end:]
        return text

    @override
    def print_usage(self, file: Any = None) -> None:
        prog = self.prog.replace(" [options]", "")
        print(f"usage: {prog} [--config FILE] [--OPTION VALUE ...]", file=file)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if "peft.method" in message:
            methods = [method.__name__ for method in registered_methods()]
            given = re.search(r"Given value: (\w+)$", message)
            message += f"\n  Methods: {', '.join(methods)}."
            message += did_you_mean(given[1], methods) if given else " Fields: --peft.method.help METHOD."
        super().error(message, ex)


class PEFTCLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule, with a :class:`PEFTCallback` under ``--peft``.

    ``--peft.method LoRA --peft.method.r 4`` chooses a method, with its defaults where nothing is said (a field alone,
    ``--peft.method.r 4``, changes the configured one); ``--peft.method null`` trains the whole model. With
    ``--ckpt_path`` the method is taken from the checkpoint unless one is given. ``--optimizer`` and ``--lr_scheduler``
    replace the module's own, over the parameters that train.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        given = sys.argv[1:] if args is None else args
        # Known before LightningCLI's own __init__, which builds a parser for each subcommand.
        first = given[0] if isinstance(given, list) and given else None
        self._subcommand = first if first in self.subcommands() else None
        defaults: dict[str, Any] = {
            "model_class": L.LightningModule,
            "subclass_mode_model": True,
            "save_config_kwargs": {"overwrite": True},
            "trainer_class": CommandTrainer,
            "parser_class": PEFTArgumentParser,
        }
        super().__init__(args=args, **{**defaults, **kwargs})

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(PEFTCallback, "peft")
        parser.set_defaults({"peft.method": {"class_path": f"{LoRA.__module__}.{LoRA.__name__}"}})

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning reads the file's hyperparameters here; a file that cannot be read should say so in our words.
        if subcommand := self.config.get("subcommand"):
            path, peft = self.config[subcommand].get("ckpt_path"), self.config[subcommand].peft
            checkpoint = read_checkpoint(path) if path and Path(path).is_file() else {}
            if peft.method == self._parser(subcommand).get_defaults().peft.method:  # the user has chosen none
                methods = methods_in(checkpoint[METADATA_KEY]) if METADATA_KEY in checkpoint else {}
                if method := methods.get(("", peft.name)):
                    self._choose(subcommand, _as_class(method.to_config()))
                elif peft.init_from:
                    self._choose(subcommand, None)
        super()._parse_ckpt_path()

    def _choose(self, subcommand: str, method: dict[str, Any] | None) -> None:
        self.config = self.parser.parse_object({subcommand: {"peft": {"method": method}}}, self.config)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._subcommand not in (None, subcommand):
            # Lightning reads the docstrings of the Trainer and of all else for each subcommand anew: a second and more
            # before the one that is asked for begins. The others keep their names only.
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in COMMANDS:  # nothing is logged there
            parser.set_defaults({"trainer.logger": False})
        return parser

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in COMMANDS}}

    @override
    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        # Lightning would build the optimizer now, before the adapters exist, over the parameters that get frozen.
        optimizer = self._get(self.config_init, "optimizer")
        if optimizer:
            scheduler = self._get(self.config_init, "lr_scheduler")
            configure = partial(_configure_optimizers, optimizer=optimizer, lr_scheduler=scheduler)
            update_wrapper(configure, _configure_optimizers)  # Lightning asks whether the hook is overridden
            self.model.configure_optimizers = MethodType(configure, self.model)

    def predict(self, **kwargs: Any) -> Any:
        """Run ``Trainer.predict`` and show the first predictions."""
        predictions = self.trainer.predict(**kwargs)
        rows = [row for batch in predictions or [] for row in (batch if isinstance(batch, list) else [])]
        if rows and all(isinstance(row, Mapping) for row in rows) and self.trainer.is_global_zero:
            rich.print(_table(rows))
        return predictions


def _as_class(config: Any) -> Any:
    """A method's config (and those inside it) as jsonargparse writes classes."""
    if isinstance(config, list):
        return [_as_class(item) for item in config]
    if not (isinstance(config, dict) and "method" in config):
        return config
    fields = {name: _as_class(value) for name, value in config.items() if name != "method"}
    return {"class_path": config["method"], "init_args": fields}


def main(args: ArgsType = None) -> None:
    """Run the command. An error of this library is shown as one message, without a traceback."""
    _hush()
    given = sys.argv[1:] if args is None else args
    try:
        # Not through LightningCLI, which would ask for a model.
        if isinstance(given, list) and len(given) == 2 and given[0] == "inspect" and not given[1].startswith("-"):
            show_file(given[1])
        else:
            PEFTCLI(args)
    except Exception as error:
        ours = _our_error(error)
        if ours is None:
            raise
        rich.print(f"[bold red]{type(ours).__name__}[/]: ", end="", file=sys.stderr)
        print(ours, file=sys.stderr)
        raise SystemExit(1) from None


def _hush() -> None:
    """Keep an advertisement, and a note to Lightning's own developers, off the user's screen."""
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )


def _our_error(error: BaseException | None) -> PEFTError | None:
    """The error of this library that ``error`` is or was caused by: the parser wraps what a constructor raises."""
    while error is not None and not isinstance(error, PEFTError):
        error = error.__cause__
    return error


def _configure_optimizers(module: L.LightningModule, optimizer: Any, lr_scheduler: Any) -> Any:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    built = instantiate_class((parameters,), optimizer)
    scheduler = instantiate_class(built, lr_scheduler) if lr_scheduler else None
    return LightningCLI.configure_optimizers(module, built, scheduler)


def _table(rows: list[Mapping[str, Any]], limit: int = 20) -> Table:
    table = Table(title=f"{min(limit, len(rows))} of {len(rows)} predictions", title_justify="left", title_style="bold")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows[:limit]:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table
