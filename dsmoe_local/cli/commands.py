"""The table of subcommands. A command's module is imported only where it is needed, to keep help fast."""

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
    "convert": CommandEntry("dsmoe_local.cli.convert", "Convert a Hugging Face checkpoint to GGUF."),
    "quantize": CommandEntry("dsmoe_local.cli.quantize", "Quantize a GGUF file."),
    "chat": CommandEntry("dsmoe_local.cli.chat", "Chat with a model in the terminal, or ask once."),
    "batch": CommandEntry("dsmoe_local.cli.batch", "Answer a file of prompts, one JSON record each."),
    "serve": CommandEntry("dsmoe_local.cli.serve", "Serve a model over HTTP with OpenAI's API."),
    "worker": CommandEntry("dsmoe_local.cli.worker", "Compute layers of other machines' models."),
    "plan": CommandEntry("dsmoe_local.cli.plan", "Plan a large model for several machines."),
    "inspect": CommandEntry("dsmoe_local.cli.inspect", "Show a model's shape, sizes and costs."),
    "eval": CommandEntry("dsmoe_local.cli.eval", "Measure perplexity and KL divergence."),
    "imatrix": CommandEntry("dsmoe_local.cli.imatrix", "Collect an importance matrix for quantize."),
    "bench": CommandEntry("dsmoe_local.cli.bench", "Measure the speed of models, side by side."),
    "experts": CommandEntry("dsmoe_local.cli.experts", "Show which experts a text uses."),
    "models": CommandEntry("dsmoe_local.cli.models", "List the models that can be named without a path."),
    "pull": CommandEntry("dsmoe_local.cli.pull", "Download a GGUF model from the Hugging Face hub."),
    "rm": CommandEntry("dsmoe_local.cli.rm", "Delete a model from the models folder."),
    "devices": CommandEntry("dsmoe_local.cli.devices", "List devices, and how to add GPU support."),
    "demo": CommandEntry("dsmoe_local.cli.demo", "Make a small, real DeepSeekMoE model, offline."),
    "config": CommandEntry("dsmoe_local.cli.config", "Show the value of every option and its source."),
    "completion": CommandEntry("dsmoe_local.cli.completion", "Print the completion script for your shell."),
}

ALIASES: Mapping[str, str] = {"run": "chat"}
"""Other names of commands."""

ELSEWHERE: Mapping[str, str] = {
    "list": "dsmoe models lists the models",
    "ls": "dsmoe models lists the models",
    "show": "dsmoe inspect MODEL describes a model",
    "create": "dsmoe quantize MODEL quantizes a model, dsmoe convert converts a checkpoint",
    "generate": "dsmoe chat MODEL -p TEXT answers once",
    "complete": "dsmoe chat MODEL -p TEXT answers once",
    "download": "dsmoe pull OWNER/REPO downloads a GGUF model; dsmoe convert, a checkpoint",
    "delete": "dsmoe rm NAME deletes a model",
    "remove": "dsmoe rm NAME deletes a model",
    "help": "dsmoe --help lists the commands, dsmoe COMMAND --help explains one",
}
"""Names of commands in other programs, ollama above all, with our command for the same task."""


def no_such_command(word: str) -> UsageError:
    """Return the error for a word that is not a command, with the command that may be meant."""
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    remedy = f"did you mean {near[0]}?" if near else "dsmoe --help lists the commands"
    return UsageError(f"there is no command {safe_line(word, 40)!r}", remedy=ELSEWHERE.get(word, remedy))


def load_command(name: str) -> click.Command:
    """Import and return the command called `name`, or of which that is an alias."""
    command: click.Command = importlib.import_module(COMMANDS[ALIASES.get(name, name)].module).command
    return command
