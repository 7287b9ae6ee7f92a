"""`dsmoe chat`: arguments of the conversation and the one-shot answer; dsmoe_local.chat does the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.configuration import Source, configurable, from_command_line, keys_of, origin_of
from dsmoe_local.cli.model_options import (
    ModelName,
    find_model,
    load_engine,
    model_option,
    model_options,
)
from dsmoe_local.cli.reply_options import check_stop, reply_limit, reply_options, sampling_parameters

if TYPE_CHECKING:
    from dsmoe_local.chat.settings import ChatSettings
    from dsmoe_local.chat.store.sessions import Session, SessionStore
    from dsmoe_local.chat.terminal.screen import Choice, Status
    from dsmoe_local.engine.process.client import EngineClient


@dataclass(frozen=True, slots=True)
class _Conversing:
    """The options of a conversation, as opposed to one answer."""

    session: str | None
    latest: bool
    no_history: bool
    plain: bool
    experts: bool
    stats: bool


@click.command(name="chat")
@click.argument("words", nargs=-1, metavar="[MODEL] [-]", type=ModelName())
@model_option
@click.option("-p", "--prompt", metavar="TEXT", help="Answer this and exit; - reads it from stdin.")
@click.option(
    "-f",
    "--file",
    "prompt_file",
    type=click.Path(),
    metavar="FILE",
    help="Answer the text of a file and exit.",
)
@click.option("-sys", "--system", "--system-prompt", default="", metavar="TEXT", help="System text.")
@click.option(
    "--on-full",
    type=click.Choice(["stop", "shift", "compact"]),
    default="stop",
    help="When the context is full: stop, shift out what is oldest, or leave out whole messages [stop].",
)
@click.option("--session", metavar="NAME", help="Go on with a kept conversation, or begin one of that name.")
@click.option("--continue", "latest", is_flag=True, help="Go on with the latest conversation.")
@click.option("--no-history", is_flag=True, help="Keep nothing: no conversation, and not what you type.")
@click.option("--plain", is_flag=True, help="Nothing but lines of text: for screen readers and logs.")
@click.option("--experts", is_flag=True, help="Show what the experts do from the start, as /experts does.")
@click.option("--json", "as_json", is_flag=True, help="With -p: one JSON object with text, usage and ending.")
@click.option(
    "--schema",
    type=click.Path(),
    metavar="FILE",
    help="With -p: the answer is JSON that this JSON schema allows.",
)
@click.option("--stats", is_flag=True, help="Tell what each reply took, on stderr with -p.")
@model_options
@reply_options
def command(
    words: tuple[str, ...],
    named_model: str | None,
    prompt: str | None,
    prompt_file: str | None,
    system: str,
    max_tokens: int,
    stop: tuple[str, ...],
    on_full: str,
    session: str | None,
    latest: bool,
    no_history: bool,
    plain: bool,
    experts: bool,
    as_json: bool,
    schema: str | None,
    stats: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Talk with a model in the terminal, or answer one prompt.

    MODEL is a name that `dsmoe models` lists, or a GGUF file of a DeepSeekMoE or LLaMA model. With -p, -f or
    a prompt on stdin the answer alone goes to stdout. A model without a chat template completes text.
    """
    from dsmoe_local.chat.settings import ChatSettings
    from dsmoe_local.chat.terminal import keys_withheld
    from dsmoe_local.chat.turns import OnFull
    from dsmoe_local.cli.prompt_input import one_prompt, read_schema

    model, dash = _model_and_dash(words, named_model)
    # A wrong path is said first; that the demo's model is missing only once there is something to answer.
    path = _find(model, named_model) if model or named_model else None
    check_stop(stop)
    text = one_prompt(prompt, prompt_file, dash)
    if text is None and not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise UsageError("a chat needs a terminal", remedy="use -p TEXT for one answer")
    _check_combinations(
        for_one_answer={"--json": "as_json", "--schema": "schema"} if text is None else {},
        for_a_chat={} if text is None else {"--session": "session", "--continue": "latest"},
    )
    json_schema = read_schema(schema) if schema is not None and text is not None else None
    settings = ChatSettings(sampling_parameters(values), reply_limit(max_tokens), stop, OnFull(on_full))
    if text is not None:
        with load_engine(path or find_model(), values) as engine:
            _answer(engine, settings, system, text, json_schema, as_json=as_json, stats=stats)
        return
    conversing = _Conversing(session, latest, no_history, plain, experts, stats)
    with ExitStack() as open_things:
        kept = _open_sessions(conversing, open_things)
        withheld = open_things.enter_context(ExitStack())
        withheld.enter_context(keys_withheld())
        own = None if model or from_command_line("named_model") else _session_model(kept)
        engine = open_things.enter_context(load_engine(own or path or find_model(), values))
        kept = replace(kept, own_model=own is not None)
        _converse(engine, settings, system, conversing, kept, withheld)


def _check_combinations(for_one_answer: dict[str, str], for_a_chat: dict[str, str]) -> None:
    """UsageError for flags that do not go together; a variable or the config file may have them for other
    runs.
    """
    for flag, name in for_one_answer.items():
        if from_command_line(name):
            raise UsageError(f"{flag} is for one answer", remedy="use it with -p")
    for flag, name in for_a_chat.items():
        if from_command_line(name):
            raise UsageError(f"{flag} is for a chat, and this is one answer", remedy="leave one of them out")
    if from_command_line("session") and from_command_line("latest"):
        raise UsageError("--session and --continue name two conversations", remedy="use one of them")


def _model_and_dash(words: tuple[str, ...], named_model: str | None) -> tuple[str | None, bool]:
    """The model's name, and whether `-` asks for the prompt on stdin."""
    names = [word for word in words if word != "-"]
    named = [named_model] if named_model and from_command_line("named_model") else []
    models = list(dict.fromkeys([*named, *names]))
    if len(models) > 1:
        raise UsageError(
            f"{safe_line(models[1], 60)!r} is taken for a second model",
            remedy='to ask something, use -p "TEXT"; otherwise name one model',
        )
    return (names[0] if names else None), len(names) < len(words)


def _find(model: str | None, named_model: str | None) -> Path:
    try:
        return find_model(model, named_model)
    except UsageError as error:
        if model is None or " " not in model:
            raise
        # It was meant as a question.
        raise UsageError(error.what, where='to ask something, use -p "TEXT"', remedy=error.remedy) from error


def _answer(
    engine: EngineClient,
    settings: ChatSettings,
    system: str,
    text: str,
    json_schema: str | None,
    *,
    as_json: bool,
    stats: bool,
) -> None:
    from dsmoe_local.chat.conversation import Conversation
    from dsmoe_local.chat.one_shot import answer

    conversation = Conversation(engine, settings, system)
    conversation.json_schema = json_schema
    answer(conversation, text, sys.stdout, as_json=as_json, stats=stats)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is stored: all sessions, and the one to go on with; whether the model is that one's."""

    sessions: SessionStore | None
    session: Session | None = None
    new_name: str = ""
    own_model: bool = False


def _open_sessions(conversing: _Conversing, open_things: ExitStack) -> _Kept:
    """Before the model is loaded: a session that is not there should be told at once."""
    from dsmoe_local.base.paths import data_folder
    from dsmoe_local.chat.store.names import check_name
    from dsmoe_local.chat.store.sessions import SessionStore

    if conversing.no_history:
        wanted = from_command_line("session") or from_command_line("latest")
        if wanted and from_command_line("no_history"):
            raise UsageError(
                "--no-history keeps no conversation to go on with", remedy="leave out --no-history"
            )
        if not wanted:
            return _Kept(None)
    sessions = SessionStore.open(data_folder() / "sessions")
    open_things.callback(sessions.close)
    for problem in sessions.problems():
        click.echo(f"note: {problem}", err=True)
    if conversing.session is not None and not from_command_line("latest"):
        found = sessions.named(conversing.session)
        if found is None:
            check_name(conversing.session)
        return _Kept(sessions, found, conversing.session)
    if conversing.latest:
        latest = sessions.latest()
        if latest is None:
            raise UsageError("there is no conversation to go on with yet", remedy="leave out --continue")
        return _Kept(sessions, latest)
    return _Kept(sessions)


def _session_model(kept: _Kept) -> Path | None:
    """The model that the session was held with; None if there is none, or it is not known.

    UsageError if its file is gone.
    """
    summary = kept.sessions.summary(kept.session) if kept.sessions and kept.session else None
    if summary is None or summary.model_path is None:
        return None
    path = Path(summary.model_path)
    # Not Path.is_file, which raises for names too long.
    if not os.path.isfile(path):
        raise UsageError(
            f"the model of the session {safe_line(summary.name, 60)} is not there any more",
            where=path,
            remedy="name the one to go on with: -m MODEL; dsmoe models lists them",
        )
    return path


def settings_given() -> frozenset[str]:
    """The settings that the command line gave, itself or with --preset."""
    from dsmoe_local.chat.settings import SETTINGS

    context = click.get_current_context()
    given = {Source.FLAG, *([Source.PRESET] if from_command_line("preset") else [])}
    keys = {
        key
        for option in configurable(context.command)
        if option.name and origin_of(context, option.name).source in given
        for key in keys_of(option)
    }
    return frozenset(name for name, setting in SETTINGS.items() if setting.key in keys)


def _converse(
    engine: EngineClient,
    settings: ChatSettings,
    system: str,
    conversing: _Conversing,
    kept: _Kept,
    withheld: ExitStack,
) -> None:
    """Talk. `withheld` holds the keys that are typed before there is an input for them."""
    from dsmoe_local.base.config_file import ConfigFile, config_path
    from dsmoe_local.base.paths import data_folder
    from dsmoe_local.chat.cache_keeper import CacheKeeper
    from dsmoe_local.chat.chat import Chat
    from dsmoe_local.chat.commands.completion import choices
    from dsmoe_local.chat.commands.table import COMMANDS
    from dsmoe_local.chat.conversation import Conversation
    from dsmoe_local.chat.store.states import StateStore
    from dsmoe_local.chat.terminal import open_terminal

    conversation = Conversation(engine, settings, system)
    if conversation.completes and system:
        raise UsageError(
            "-sys: the model has no chat template, it takes no system text", remedy="write it into the text"
        )
    if kept.session is not None and not from_command_line("system"):
        # The session has a system text of its own.
        system = ""
    caches = None if kept.sessions is None else CacheKeeper(StateStore(data_folder() / "sessions"))

    def status() -> Status:
        return chat.status()

    def complete(before: str) -> Iterable[Choice]:
        return choices(before, COMMANDS, chat)

    terminal = open_terminal(
        plain=conversing.plain,
        status=status,
        complete=complete,
        history_path=None if kept.sessions is None else data_folder() / "history",
    )
    chat = Chat(
        conversation,
        terminal,
        ConfigFile(config_path()),
        sessions=kept.sessions,
        caches=caches,
        fixed=settings_given(),
        stats=conversing.stats,
    )
    chat.begin(
        kept.session,
        name=kept.new_name,
        system=system,
        own_model=kept.own_model,
        experts=conversing.experts,
    )
    withheld.close()
    left = False
    try:
        terminal.run(chat.take, chat.cancel, chat.kill)
        left = True
    finally:
        chat.close(keep=left)
