"""`dsmoe completion SHELL`: the script that makes a shell complete our commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_SCRIPTS = ("dsmoe", "dsmoe-convert", "dsmoe-quantize", "dsmoe-chat", "dsmoe-batch")


@click.command(name="completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL.

    Put it where your shell finds it, for example:

    \b
        dsmoe completion bash >> ~/.bashrc
        dsmoe completion zsh >> ~/.zshrc
        dsmoe completion fish > ~/.config/fish/completions/dsmoe.fish
    """
    from dsmoe_local.cli.main import group

    completion_class = get_completion_class(shell)
    assert completion_class is not None
    for program in _SCRIPTS:
        variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
        click.echo(completion_class(group, {}, program, variable).source())
