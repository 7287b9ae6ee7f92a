"""`dsmoe chat`: arguments of the conversation and the one-shot answer; dsmoe_local.chat does the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import FileError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.model_options import (
    check_stop,
    find_model,
    load_engine,
    model_options,
    sampling_options,
    sampling_parameters,
)

if TYPE_CHECKING:
    from dsmoe_local.chat.conversation import Conversation

_MAX_PROMPT = 16 << 20


@click.command(name="chat")
@click.argument("model", required=False, metavar="[MODEL.gguf]")
@click.option("-m", "--model", "named_model", metavar="FILE", help="The model; without one, the demo's.")
@click.option("-p", "--prompt", metavar="TEXT", help="Answer this and exit; - reads it from stdin.")
@click.option("-f", "--file", "prompt_file", metavar="FILE", help="Answer the text of a file and exit.")
@click.option("-sys", "--system", default="", metavar="TEXT", help="System text.")
@click.option(
    "-n", "--predict", "max_tokens", type=int, metavar="N", help="Longest reply in tokens [-1: no limit]."
)
@click.option(
    "-r", "--reverse-prompt", "stop", multiple=True, metavar="TEXT", help="End replies before TEXT."
)
@click.option("--json", "as_json", is_flag=True, help="With -p: one JSON object with text, usage and ending.")
@click.option("--stats", is_flag=True, help="Tell what each reply took, on stderr with -p.")
@click.option("--no-history", is_flag=True, help="Do not keep what you type for Ctrl-R.")
@model_options
@sampling_options
def command(
    model: str | None,
    named_model: str | None,
    prompt: str | None,
    prompt_file: str | None,
    system: str,
    max_tokens: int | None,
    stop: tuple[str, ...],
    as_json: bool,
    stats: bool,
    no_history: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Talk with a model in the terminal, or answer one prompt.

    MODEL.gguf is a file of a DeepSeekMoE or LLaMA model. With -p, -f or a prompt on stdin the answer alone
    goes to stdout. A model without a chat template completes text.
    """
    from dsmoe_local.chat.settings import ChatSettings

    # A wrong path is said first; that the demo's model is missing only once there is something to answer.
    path = find_model(model, named_model) if model or named_model else None
    check_stop(stop)
    text = _one_prompt(prompt, prompt_file)
    if text is None and not sys.stdout.isatty():
        raise UsageError("a chat needs a terminal", remedy="use -p TEXT for one answer")
    if max_tokens is not None and max_tokens < 1:
        if max_tokens != -1:
            raise UsageError(
                f"-n {max_tokens} is out of range", remedy="it takes 1 or more, or -1 for no limit"
            )
        max_tokens = None
    settings = ChatSettings(sampling_parameters(values), max_tokens, stop)
    with load_engine(path or find_model(), values) as engine:
        from dsmoe_local.chat.conversation import Conversation

        conversation = Conversation(engine, settings, system)
        if text is None:
            _interactive(conversation, stats=stats, history=not no_history)
        else:
            _answer(conversation, text, as_json=as_json, stats=stats)


def _interactive(conversation: Conversation, *, stats: bool, history: bool) -> None:
    from dsmoe_local.chat.repl import Repl
    from dsmoe_local.chat.screen import Screen

    Repl(conversation, Screen(), history=history, stats=stats).run()


def _answer(conversation: Conversation, text: str, *, as_json: bool, stats: bool) -> None:
    from dsmoe_local.chat.one_shot import answer
    from dsmoe_local.chat.screen import describe_usage

    answer(conversation, text, sys.stdout, as_json=as_json)
    if conversation.finish_reason == "context_full":
        click.echo("note: the context is full, the reply ends there: -c", err=True)
    if stats and conversation.usage is not None:
        click.echo(describe_usage(conversation.usage), err=True)


def _one_prompt(prompt: str | None, prompt_file: str | None) -> str | None:
    """The text to answer once; None for a conversation."""
    if prompt is not None and prompt_file is not None:
        raise UsageError("-p and -f name two prompts", remedy="use one of them")
    if prompt_file is not None:
        try:
            with Path(prompt_file).open("rb") as file:
                return _decoded(file.read(_MAX_PROMPT + 1), safe_line(prompt_file))
        except OSError as error:
            raise FileError(
                f"the prompt cannot be read: {error.strerror}", where=safe_line(prompt_file)
            ) from error
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        return _decoded(sys.stdin.buffer.read(_MAX_PROMPT + 1), "stdin")
    return None if prompt is None else _not_empty(prompt)


def _decoded(content: bytes, source: str) -> str:
    if len(content) > _MAX_PROMPT:
        raise FileError("the prompt is larger than 16 MiB", where=source)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError("the prompt is not UTF-8", where=f"{source}, byte {error.start}") from error
    # The shell's own newline at the end is not part of what was asked.
    return _not_empty(text.removesuffix("\n"))


def _not_empty(text: str) -> str:
    if not text.strip():
        raise UsageError("the prompt is empty", remedy="use -p TEXT, or leave out the pipe to chat")
    return text
