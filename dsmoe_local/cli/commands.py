"""The table of subcommands. A command's module is imported only where it is needed: help must be instant."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import click


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """A subcommand: the module that defines `command`, and its line in the list of commands."""

    module: str
    summary: str


COMMANDS: Mapping[str, CommandEntry] = {
    "convert": CommandEntry("dsmoe_local.cli.convert", "Hugging Face checkpoint to GGUF, in one pass."),
    "quantize": CommandEntry("dsmoe_local.cli.quantize", "GGUF to a smaller GGUF."),
    "chat": CommandEntry("dsmoe_local.cli.chat", "Talk with a model in the terminal."),
    "batch": CommandEntry("dsmoe_local.cli.batch", "Answer a file of prompts, one JSON record each."),
    "inspect": CommandEntry("dsmoe_local.cli.inspect", "Show what a model is and what it costs."),
    "eval": CommandEntry("dsmoe_local.cli.eval", "Measure how well a model predicts a text."),
    "imatrix": CommandEntry("dsmoe_local.cli.imatrix", "Collect what each weight counts, for quantizing."),
    "bench": CommandEntry("dsmoe_local.cli.bench", "Measure how fast models are, side by side."),
    "experts": CommandEntry("dsmoe_local.cli.experts", "Show which experts a text makes a model lean on."),
    "models": CommandEntry("dsmoe_local.cli.models", "List the models that are found by name."),
    "devices": CommandEntry("dsmoe_local.cli.devices", "List what models can run on, and how to add GPUs."),
    "demo": CommandEntry("dsmoe_local.cli.demo", "Make a small real DeepSeekMoE model, offline."),
    "config": CommandEntry("dsmoe_local.cli.config", "Show every option's value and where it comes from."),
    "completion": CommandEntry("dsmoe_local.cli.completion", "Print the completion script for your shell."),
}


def _with_dashes(token: str) -> str:
    return token.replace("_", "-")


def import_command(name: str) -> click.Command:
    """The command called `name`, with the options that all commands share."""
    command: click.Command = importlib.import_module(COMMANDS[name].module).command
    command.context_settings.setdefault("help_option_names", ["-h", "--help"])
    # As in llama.cpp, --max_tokens is --max-tokens.
    command.context_settings.setdefault("token_normalize_func", _with_dashes)
    if not any(parameter.name == "debug" for parameter in command.params):
        debug = click.Option(["--debug"], is_flag=True, expose_value=False, help="Show tracebacks of errors.")
        command.params.append(debug)
    return command
