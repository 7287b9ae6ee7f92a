"""`dsmoe chat`: arguments of chats and single answers. dsmoe_local.chat does the work."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.settings import SETTINGS
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import find_model, model_argument, model_option, models_folder
from dsmoe_local.cli.model_options import load_engine, loading_options, model_options
from dsmoe_local.cli.option_sources import Source, flag_of, from_command_line, origin_of, settle
from dsmoe_local.cli.options import FLAG, Group, json_option, option, text_value, typed
from dsmoe_local.cli.reply_options import reply_options, reply_settings, setting_option

if TYPE_CHECKING:
    from dsmoe_local.chat.remote.engine import RemoteEngine
    from dsmoe_local.chat.settings import ChatSettings
    from dsmoe_local.chat.store.sessions import Session, SessionStore
    from dsmoe_local.chat.terminal.screen import Choice, Status
    from dsmoe_local.engine.interface import ReloadableEngine
    from dsmoe_local.engine.types import ModelOptions, Tools


@dataclass(frozen=True, slots=True)
class _ChatOptions:
    """The options of a chat, as opposed to one answer."""

    session: str | None
    latest: bool | None
    no_history: bool | None
    plain: bool
    experts: bool
    stats: bool
    tools: Tools | None


@define_command(
    "chat",
    ("dsmoe chat model.gguf", "Chat; /help lists the commands."),
    ('dsmoe chat model.gguf -p "Why is the sky blue?"', "Answer once."),
    ("git diff | dsmoe chat -p 'Review this.'", "Add stdin to the prompt."),
    ("dsmoe chat --server http://192.168.0.2:8080", "Use the model of another computer."),
)
@model_argument("words", "[MODEL] [-]", nargs=-1)
@model_option
@option(
    "--server",
    "server",
    "Use a server with OpenAI's API, such as dsmoe serve on another computer. MODEL is a name there.",
    text_value("URL"),
)
@option(
    "--api-key",
    "api_key",
    "Key for --server. Other users of this computer can see command lines: better set DSMOE_API_KEY, or"
    " api-key in the config file.",
    text_value("KEY"),
    secret=True,
)
@option("-p, --prompt", "prompt", "Answer TEXT and exit; - reads it from stdin.")
@option("-f, --file", "prompt_file", "Answer the text of a file and exit.", typed(click.Path(), "FILE"))
@option("-sys, --system, --system-prompt", "system", "System prompt.", default="", show_default=False)
@option("--continue", "latest", "Continue the latest conversation.", FLAG)
@option("--session", "session", "Continue the conversation NAME, or start it.", text_value("NAME"))
@option(
    "--no-history",
    "no_history",
    "Do not store the conversation or your inputs.",
    FLAG,
    Group.CONVERSATION,
)
@setting_option("on_full", group=Group.CONVERSATION)
@setting_option("think", group=Group.CONVERSATION)
@option(
    "--experts",
    "experts",
    "Show the routed experts of replies, as /experts does.",
    FLAG,
    Group.CONVERSATION,
)
@option(
    "--plain", "plain", "Print lines of text only, for screen readers and logs.", FLAG, Group.CONVERSATION
)
@option(
    "--stats",
    "stats",
    "Show the tokens and the time of each reply; with -p on stderr.",
    FLAG,
    Group.CONVERSATION,
)
@json_option("Print a JSON object with text, usage and finish reason.", group=Group.ANSWER)
@option(
    "--schema",
    "schema",
    "Answer with JSON that fits a JSON schema. Limit its length with -n: a schema may allow endless answers.",
    typed(click.Path(), "FILE"),
    Group.ANSWER,
)
@option(
    "--tools",
    "tools",
    "Offer the functions in a JSON file, in the form of OpenAI's requests. Calls are shown, not run.",
    typed(click.Path(), "FILE"),
    Group.CONVERSATION,
)
@model_options
@reply_options
def command(
    words: tuple[str, ...],
    named_model: str | None,
    server: str | None,
    api_key: str | None,
    prompt: str | None,
    prompt_file: str | None,
    system: str,
    session: str | None,
    latest: bool,
    no_history: bool,
    plain: bool,
    experts: bool,
    as_json: bool,
    schema: str | None,
    tools: str | None,
    stats: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Chat with a model in the terminal, or answer one prompt.

    MODEL is a GGUF file of a DeepSeekMoE or LLaMA model, or a name that `dsmoe models` lists. With -p, -f or
    input from a pipe, the answer is printed on stdout. A model without a chat template completes the text.
    """
    from dsmoe_local.chat.terminal import keys_withheld
    from dsmoe_local.cli.prompt_input import one_prompt, read_schema, read_tools

    model, dash = _model_and_dash(words, named_model)
    # Report a wrong path first, but a missing demo model only if there is something to answer.
    path = _find(model, named_model) if server is None and (model or named_model) else None
    settings = reply_settings(values)
    if server is not None:
        # The options of the model are left.
        _check_local([*values, "experts"])
    text = one_prompt(prompt, prompt_file, dash)
    if text is None and not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise UsageError("a chat needs a terminal", remedy="use -p TEXT for one answer")
    _check_combinations(is_chat=text is None)
    json_schema = read_schema(schema) if schema is not None and text is not None else None
    offered = None if tools is None else read_tools(tools)
    if json_schema is not None and offered is not None:
        raise UsageError("--schema and --tools exclude each other", remedy="leave one of them out")
    asked_model = model or (named_model if from_command_line("named_model") else None)
    if text is not None:
        with (
            load_engine(path or find_model(), values)
            if server is None
            else _connect(server, api_key, asked_model)
        ) as engine:
            _answer(engine, settings, system, text, json_schema, offered, as_json=as_json, stats=stats)
        return
    history = {"session": session, "latest": latest, "no_history": no_history}
    settled = settle(history, ("session",), ("latest",), ("no_history",))
    shows_experts = experts and server is None
    options = _ChatOptions(**settled, plain=plain, experts=shows_experts, stats=stats, tools=offered)
    with ExitStack() as resources:
        storage = _open_storage(options, resources)
        typed_ahead = resources.enter_context(ExitStack())
        typed_ahead.enter_context(keys_withheld())
        if server is not None:
            remote = resources.enter_context(_connect(server, api_key, asked_model))
            _converse(remote, settings, system, options, storage, typed_ahead, remote.options)
            return
        session_model = None if asked_model else _session_model(storage)
        path = session_model or path or find_model()
        asked = loading_options(path, dict(values))
        engine = resources.enter_context(load_engine(path, values))
        storage = replace(storage, own_model=session_model is not None)
        for problem in storage.problems.result() if storage.problems else ():
            click.echo(f"note: {problem}", err=True)
        _converse(engine, settings, system, options, storage, typed_ahead, asked)


def _check_local(names: Iterable[str]) -> None:
    """Raise UsageError for flags on the command line that need the model on this computer."""
    for name in names:
        if from_command_line(name):
            raise UsageError(
                f"{flag_of(name)} needs the model on this computer, not on a server",
                remedy="leave it or --server out",
            )


def _connect(server: str, api_key: str | None, model: str | None) -> RemoteEngine:
    """Return the model on a server. Raises UsageError, ServerError."""
    from dsmoe_local.chat.remote.connection import Server
    from dsmoe_local.chat.remote.engine import RemoteEngine

    return RemoteEngine(Server.at(server, api_key), model)


def _check_combinations(*, is_chat: bool) -> None:
    """Raise UsageError for flags on the command line that do not go together.

    Variables and the config file may set them for other runs.
    """
    for name in ("as_json", "schema") if is_chat else ("session", "latest"):
        if from_command_line(name):
            what, remedy = (
                ("one answer", "use it with -p") if is_chat else ("chats", "leave it or the prompt out")
            )
            raise UsageError(f"{flag_of(name)} is for {what}", remedy=remedy)


def _model_and_dash(words: tuple[str, ...], named_model: str | None) -> tuple[str | None, bool]:
    """Return the name of the model, and whether `-` asks for a prompt on stdin."""
    names = [word for word in words if word != "-"]
    named = [named_model] if named_model and from_command_line("named_model") else []
    models = list(dict.fromkeys([*named, *names]))
    if len(models) > 1:
        raise UsageError(
            f"two models are named, the second is {safe_line(models[1], 60)!r}",
            remedy='for a question, use -p "TEXT"',
        )
    return (names[0] if names else None), len(names) < len(words)


def _find(model: str | None, named_model: str | None) -> Path:
    try:
        return find_model(model, named_model)
    except UsageError as error:
        if model is None or " " not in model:
            raise
        # A text with spaces is probably a question.
        raise UsageError(error.what, where='for a question, use -p "TEXT"', remedy=error.remedy) from error


def _answer(
    engine: ReloadableEngine,
    settings: ChatSettings,
    system: str,
    text: str,
    json_schema: str | None,
    tools: Tools | None,
    *,
    as_json: bool,
    stats: bool,
) -> None:
    from dsmoe_local.chat.conversation import Conversation
    from dsmoe_local.chat.one_shot import answer

    conversation = Conversation(engine, settings, system)
    conversation.json_schema, conversation.tools = json_schema, tools
    answer(conversation, text, sys.stdout, as_json=as_json, stats=stats)


@dataclass(frozen=True, slots=True)
class _Storage:
    """The stored sessions, and the one to continue or the name of a new one. `own_model`: its model is used.

    `problems` is the result of checking the database, which runs while the model is loaded.
    """

    sessions: SessionStore | None
    session: Session | None = None
    new_name: str = ""
    own_model: bool = False
    problems: Future[list[str]] | None = None


def _open_storage(options: _ChatOptions, resources: ExitStack) -> _Storage:
    """Open the store and find the session, before the model is loaded."""
    from dsmoe_local.base.paths import data_folder
    from dsmoe_local.chat.store.names import check_name
    from dsmoe_local.chat.store.sessions import SessionStore

    if options.no_history:
        return _Storage(None)
    sessions = SessionStore.open(data_folder() / "sessions")
    resources.callback(sessions.close)
    executor = resources.enter_context(ThreadPoolExecutor(1))
    stop = threading.Event()
    # Called before the executor waits for the check, for example when loading the model fails.
    resources.callback(stop.set)
    problems = executor.submit(sessions.problems, stop)
    if options.session is not None:
        found = sessions.named(options.session)
        if found is None:
            check_name(options.session)
        return _Storage(sessions, found, options.session, problems=problems)
    if options.latest:
        latest = sessions.latest()
        if latest is None:
            raise UsageError("there is no conversation to continue yet", remedy="leave out --continue")
        return _Storage(sessions, latest, problems=problems)
    return _Storage(sessions, problems=problems)


def _session_model(storage: _Storage) -> Path | None:
    """Return the model of the session to continue; None if there is no session or its model is unknown.

    UsageError if the file of the model is gone.
    """
    summary = storage.sessions.summary(storage.session) if storage.sessions and storage.session else None
    if summary is None or summary.model_path is None:
        return None
    if "://" in summary.model_path:
        raise UsageError(
            f"the model of the session {safe_line(summary.name, 60)} is on a server",
            remedy=f"add --server {summary.model_path}, or name a model with -m MODEL",
        )
    path = Path(summary.model_path)
    # Path.is_file raises OSError for names that are too long.
    if not os.path.isfile(path):
        raise UsageError(
            f"the model of the session {safe_line(summary.name, 60)} is gone",
            where=path,
            remedy="name another one with -m MODEL; dsmoe models lists them",
        )
    return path


def settings_given() -> frozenset[str]:
    """Return the settings that the command line gave, by a flag or by --preset."""
    context = click.get_current_context()
    given = {Source.FLAG, *([Source.PRESET] if from_command_line("preset") else [])}
    return frozenset(name for name in SETTINGS if origin_of(context, name).source in given)


def _converse(
    engine: ReloadableEngine,
    settings: ChatSettings,
    system: str,
    options: _ChatOptions,
    storage: _Storage,
    typed_ahead: ExitStack,
    asked: ModelOptions,
) -> None:
    """Run the chat. `asked` are the options of the command line, for other models that the user switches to.

    `typed_ahead` holds back keys that are typed before the input line is ready.
    """
    from dsmoe_local.base.config_file import ConfigFile, config_path
    from dsmoe_local.base.paths import data_folder
    from dsmoe_local.chat.chat import Chat
    from dsmoe_local.chat.commands.completion import choices
    from dsmoe_local.chat.commands.table import COMMANDS
    from dsmoe_local.chat.conversation import Conversation
    from dsmoe_local.chat.saving import CacheKeeper
    from dsmoe_local.chat.store.states import StateStore
    from dsmoe_local.chat.terminal import open_terminal

    conversation = Conversation(engine, settings, system)
    conversation.tools = options.tools
    if conversation.completes and system:
        raise UsageError("-sys needs a model with a chat template", remedy="put the text into the prompt")
    if storage.session is not None and not from_command_line("system"):
        # The session has its own system text.
        system = ""
    stores_caches = storage.sessions is not None and not engine.info.server
    caches = None if not stores_caches else CacheKeeper(StateStore(data_folder() / "sessions"))

    def status() -> Status:
        return chat.status()

    def complete(before: str) -> Iterable[Choice]:
        return choices(before, COMMANDS, chat)

    terminal = open_terminal(
        plain=options.plain,
        status=status,
        complete=complete,
        history_path=None if storage.sessions is None else data_folder() / "history",
    )
    chat = Chat(
        conversation,
        terminal,
        ConfigFile(config_path()),
        sessions=storage.sessions,
        caches=caches,
        fixed=settings_given(),
        stats=options.stats,
        models_folder=models_folder()[0],
        options=asked,
    )
    chat.begin(
        storage.session,
        name=storage.new_name,
        system=system,
        own_model=storage.own_model,
        experts=options.experts,
    )
    typed_ahead.close()
    left = False
    try:
        terminal.run(chat.take, chat.cancel, chat.kill)
        left = True
    finally:
        chat.close(keep=left)
