"""The command ``lightning-peft``: its parser, and its own subcommands beside LightningCLI's."""

from lightning_peft.cli.parser import PEFTCLI, main

__all__ = ["PEFTCLI", "main"]
