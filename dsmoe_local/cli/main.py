"""The programs: run a command, and turn errors into messages and exit codes."""

# ruff: noqa: E402
from __future__ import annotations

import signal

# While modules are imported, Ctrl-C ends the program without a traceback.
_on_interrupt = signal.getsignal(signal.SIGINT)
if _on_interrupt is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

import click

from dsmoe_local import __version__
from dsmoe_local.base.errors import DsmoeError, InterruptedRunError
from dsmoe_local.base.signals import handling
from dsmoe_local.base.text import safe_line, safe_text
from dsmoe_local.cli.commands import ALIASES, COMMANDS, load_command, no_such_command

_OFF = frozenset({"", "0", "f", "false", "n", "no", "off"})
"""Values of DSMOE_DEBUG that click, too, reads as off."""


class LazyGroup(click.Group):
    """A group that lists the commands from their table and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *ALIASES]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load_command(cmd_name) if cmd_name in COMMANDS or cmd_name in ALIASES else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word not in self.list_commands(ctx) and not word.startswith("-") and not ctx.resilient_parsing:
            raise no_such_command(word)
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples."""
        with formatter.section("Examples"):
            formatter.write_dl(
                [
                    ("dsmoe demo --chat", "Make the demo model and chat with it."),
                    ("dsmoe chat --help", "Explain a command."),
                ]
            )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            others = [(name, f"The same as {command}.") for name, command in ALIASES.items()]
            formatter.write_dl([*((name, entry.summary) for name, entry in COMMANDS.items()), *others])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsmoe")
def group() -> None:
    """Convert, quantize and run mixtures of experts on a laptop."""


def run(load: Callable[[], click.Command], program: str) -> int:
    """Run the command line of this process with the command that `load` returns. Return the exit code.

    Errors are printed on stderr. SIGTERM interrupts a command as Ctrl-C does.
    """
    _open_closed_streams()
    _replace_unencodable()
    received: list[int] = []

    def terminate(number: int) -> None:
        received.append(number)
        raise KeyboardInterrupt

    with handling({signal.SIGTERM: terminate}):
        return _run(load, program, received)


def _run(load: Callable[[], click.Command], program: str, received: Sequence[int]) -> int:
    debug = "--debug" in sys.argv or os.environ.get("DSMOE_DEBUG", "").strip().lower() not in _OFF
    try:
        result = load().main(prog_name=program, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        # The message is the help page.
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        complain(_one_dash(load()) or "\n".join(_lines(error)))
        return error.exit_code
    except DsmoeError as error:
        if debug:
            traceback.print_exc()
        complain(_one_dash(load()) or str(error))
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        interrupted = _interruption(error, received)
        complain(str(interrupted))
        return interrupted.exit_code
    except BrokenPipeError:
        # The program that reads our output has ended.
        _discard_output()
        return 1
    except OSError as error:
        # For example, stdout on a full disk, a folder without permission, or a name that is too long.
        if debug:
            traceback.print_exc()
        complain(f"{error.strerror or error}\n{safe_line(str(error.filename or ''))}")
        try:
            sys.stdout.flush()
        except OSError:
            _discard_output()
        return 1
    except Exception as error:  # noqa: BLE001 - a bug must not show as a traceback
        if debug:
            traceback.print_exc()
        complain(f"internal error: {type(error).__name__}: {error}\nrun again with --debug and report it")
        return 1
    return result if isinstance(result, int) else 0


def _interruption(error: BaseException, received: Sequence[int]) -> InterruptedRunError:
    """Return the error to show for Ctrl-C, or for the signal that was received.

    If the signal came while the work was ending after an earlier one, this is the error of the work.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InterruptedRunError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return InterruptedRunError("interrupted", signal_number=received[0] if received else signal.SIGINT)


def _discard_output() -> None:
    """Redirect stdout, so that flushing it at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Open streams that the shell closed (`<&-`), which Python has as None.

    Opened in this order, they get their usual descriptors. stdout is opened for reading, so that writing
    to it fails, as in other programs: a result is never lost silently.
    """
    for name, flags, mode in (
        ("stdin", os.O_RDONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, flags), mode, encoding="utf-8"))  # noqa: SIM115 - open until the end


def _replace_unencodable() -> None:
    """Let stdout print a question mark for characters that its encoding does not have."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _lines(error: click.ClickException) -> list[str]:
    """Return click's message on one line, then the source of the value, or the usage."""
    from dsmoe_local.cli.option_sources import source_of_error

    what = " ".join(error.format_message().split())
    where = source_of_error(error)
    context = getattr(error, "ctx", None)
    if where or context is None:
        return [what, where]
    lines = [what, f"see {context.command_path} --help"]
    if type(error) is click.UsageError or isinstance(error, click.MissingParameter):
        # Too many or too few arguments.
        lines.insert(1, " ".join(context.get_usage().split()))
    return lines


def _one_dash(command: click.Command) -> str:
    """Return the message for a long option with one dash, which click misreads; empty if there is none."""
    words = sys.argv[1:]
    name = next((word for word in words if word in COMMANDS or word in ALIASES), None)
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
    """Print an error on stderr, at most three lines, safe to print."""
    lines = safe_text(message).splitlines()[:3] or ["unknown error"]
    click.echo("\n".join([f"error: {lines[0]}", *(f"  {line}" for line in lines[1:])]), err=True)


def dsmoe() -> None:
    """The `dsmoe` script."""
    sys.exit(run(lambda: group, "dsmoe"))


def convert() -> None:
    """The `dsmoe-convert` script."""
    sys.exit(run(lambda: load_command("convert"), "dsmoe-convert"))


def quantize() -> None:
    """The `dsmoe-quantize` script."""
    sys.exit(run(lambda: load_command("quantize"), "dsmoe-quantize"))


def chat() -> None:
    """The `dsmoe-chat` script."""
    sys.exit(run(lambda: load_command("chat"), "dsmoe-chat"))


def batch() -> None:
    """The `dsmoe-batch` script."""
    sys.exit(run(lambda: load_command("batch"), "dsmoe-batch"))


if _on_interrupt is signal.default_int_handler:
    signal.signal(signal.SIGINT, _on_interrupt)
