"""`dsmoe completion SHELL`: the script that completes our commands and options in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from dsmoe_local.cli.command import define_command

PROGRAMS = ("dsmoe", "dsmoe-convert", "dsmoe-quantize", "dsmoe-chat", "dsmoe-batch")

# zsh has no completion until compinit runs. -i: ignore folders of other users without asking.
_BEGINNINGS = {"zsh": "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }"}


@define_command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of all five programs for a shell.

    Add it to the startup files of your shell:

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
