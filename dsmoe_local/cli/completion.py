"""`dsmoe completion SHELL`: the script that makes a shell complete our commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAMS = ("dsmoe", "dsmoe-convert", "dsmoe-quantize", "dsmoe-chat", "dsmoe-batch")

# Without a framework, zsh has no completion at all before this. -i: no question about foreign folders.
_BEGINNINGS = {"zsh": "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }"}


@click.command(name="completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL, for all five programs.

    Put it where your shell reads it when it starts:

    \b
        dsmoe completion bash >> ~/.bashrc
        dsmoe completion zsh >> ~/.zshrc
        dsmoe completion fish > ~/.config/fish/conf.d/dsmoe.fish
    """
    from dsmoe_local.cli.main import group

    completion_class = get_completion_class(shell)
    assert completion_class is not None
    if shell in _BEGINNINGS:
        click.echo(_BEGINNINGS[shell])
    for program in PROGRAMS:
        variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
        click.echo(completion_class(group, {}, program, variable).source())
