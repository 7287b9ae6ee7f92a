"""The commands and their exit codes. A command's module is imported only to run it: help must be instant."""

# ruff: noqa: E402
from __future__ import annotations

import signal

# Ctrl-C ends the imports as it ends any program, without a traceback.
_on_interrupt = signal.getsignal(signal.SIGINT)
if _on_interrupt is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import io
import os
import re
import sys
import traceback

import click

from dsmoe_local import __version__
from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.text import safe_line, safe_text
from dsmoe_local.cli.commands import COMMANDS, import_command, no_such_command
from dsmoe_local.cli.configuration import attach, where_from

_INTERRUPTED = 130
_OFF = frozenset({"", "0", "f", "false", "n", "no", "off"})


class LazyGroup(click.Group):
    """A group that lists commands from the table above and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word not in COMMANDS and not word.startswith("-") and not ctx.resilient_parsing:
            raise no_such_command(word)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=False
)
@click.version_option(__version__, prog_name="dsmoe")
def group() -> None:
    """Convert, quantize and run DeepSeekMoE models on a laptop."""


def load_command(name: str) -> click.Command:
    """The command called `name`, and what speaks for options that are not given."""
    command = import_command(name)
    attach(command, name)
    return command


def run(command: click.Command, program: str) -> int:
    """Run a command line and turn what comes out of it into messages on stderr and an exit code."""
    _open_closed_streams()
    _take_any_text()
    # As click reads variables of flags.
    debug = "--debug" in sys.argv or os.environ.get("DSMOE_DEBUG", "").strip().lower() not in _OFF
    try:
        result = command.main(prog_name=program, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        # Its message is the whole help.
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        complain(_one_dash(command) or "\n".join(_lines(error)))
        return error.exit_code
    except DsmoeError as error:
        if debug:
            traceback.print_exc()
        complain(_one_dash(command) or str(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        complain("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone.
        _discard_output()
        return 1
    except OSError as error:
        # A full disk behind stdout, or none; a folder that may not be looked into; a name too long.
        if debug:
            traceback.print_exc()
        complain(f"{error.strerror or error}\n{safe_line(str(error.filename or ''))}")
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort: a bug must not show as a traceback
        if debug:
            traceback.print_exc()
        complain(f"internal error: {type(error).__name__}: {error}\nrun again with --debug and report it")
        return 1
    return result if isinstance(result, int) else 0


def _discard_output() -> None:
    """Let nothing try to flush into a stdout that takes nothing, at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Python has None for a stream that the shell closed (`<&-`); opened in order they get their numbers.

    A closed stdout refuses what is written to it, as it does other programs: a result is never lost silently.
    """
    for name, flags, mode in (
        ("stdin", os.O_RDONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, flags), mode, encoding="utf-8"))  # noqa: SIM115 - open until the end


def _take_any_text() -> None:
    """What the encoding of stdout does not have becomes a question mark, as in a C locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _lines(error: click.ClickException) -> list[str]:
    """What click says, on one line; where the value came from, or how the command is used."""
    what = " ".join(error.format_message().split())
    where = where_from(error)
    context = getattr(error, "ctx", None)
    if where or context is None:
        return [what, where]
    lines = [what, f"see {context.command_path} --help"]
    if type(error) is click.UsageError or isinstance(error, click.MissingParameter):
        # Too many arguments, or too few.
        lines.insert(1, " ".join(context.get_usage().split()))
    return lines


def _one_dash(command: click.Command) -> str:
    """What to say if a long option was typed with one dash; click reads that as short ones, or as a value."""
    words = sys.argv[1:]
    name = next((word for word in words if word in COMMANDS), None)
    if isinstance(command, LazyGroup) and name is not None:
        command = load_command(name)
    options = {flag: each for each in command.params for flag in (*each.opts, *each.secondary_opts)}
    before = ""
    for word in words:
        flag = word.partition("=")[0]
        is_value = before in options and not getattr(options[before], "is_flag", True)
        if (
            re.fullmatch(r"-\w[\w-]+", flag)
            and not is_value
            and flag not in options
            and f"-{flag}" in options
        ):
            return f"there is no option {flag}\ndid you mean -{flag}?"
        before = word
    return ""


def complain(message: str) -> None:
    """An error of at most three lines, on stderr, each line safe to print."""
    lines = safe_text(message).splitlines()[:3] or ["unknown error"]
    click.echo("\n".join([f"error: {lines[0]}", *(f"  {line}" for line in lines[1:])]), err=True)


def dsmoe() -> None:
    """The `dsmoe` script."""
    sys.exit(run(group, "dsmoe"))


def convert() -> None:
    """The `dsmoe-convert` script."""
    sys.exit(run(load_command("convert"), "dsmoe-convert"))


def quantize() -> None:
    """The `dsmoe-quantize` script."""
    sys.exit(run(load_command("quantize"), "dsmoe-quantize"))


def chat() -> None:
    """The `dsmoe-chat` script."""
    sys.exit(run(load_command("chat"), "dsmoe-chat"))


def batch() -> None:
    """The `dsmoe-batch` script."""
    sys.exit(run(load_command("batch"), "dsmoe-batch"))


if _on_interrupt is signal.default_int_handler:
    signal.signal(signal.SIGINT, _on_interrupt)
