"""The table of subcommands. A command's module is imported only where it is needed: help must be instant."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line


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

ELSEWHERE: Mapping[str, str] = {
    "run": "dsmoe chat MODEL talks with a model; with -p TEXT it answers once",
    "pull": "dsmoe convert REPOSITORY --type q4 fetches a checkpoint and makes a model of it",
    "list": "dsmoe models lists the models",
    "ls": "dsmoe models lists the models",
    "show": "dsmoe inspect MODEL shows what a model is",
    "create": "dsmoe quantize MODEL makes a smaller model, dsmoe convert one of a checkpoint",
    "serve": "there is no server yet; dsmoe batch answers files of OpenAI requests",
    "rm": "delete the file: dsmoe models shows where it is",
    "generate": "dsmoe chat MODEL -p TEXT answers once",
    "complete": "dsmoe chat MODEL -p TEXT answers once",
    "download": "dsmoe convert REPOSITORY fetches a checkpoint and makes a model of it",
    "help": "dsmoe --help lists the commands, dsmoe COMMAND --help explains one",
}
"""What other programs call commands, ollama first, and which of ours does it."""


def _with_dashes(token: str) -> str:
    return token.replace("_", "-")


def no_such_command(word: str) -> UsageError:
    """The error for a word that is no command, with the one that may be meant."""
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    remedy = f"did you mean {near[0]}?" if near else "dsmoe --help lists the commands"
    return UsageError(f"there is no command {safe_line(word, 40)!r}", remedy=ELSEWHERE.get(word, remedy))


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
