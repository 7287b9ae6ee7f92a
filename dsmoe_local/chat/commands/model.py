"""/model: list the known models, and switch to another one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.paths import absolute
from dsmoe_local.base.progress import Advanced, Event, Finished, Note, Started
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.commands.declare import Chat, Command, Commands
from dsmoe_local.chat.remote.engine import RemoteEngine
from dsmoe_local.chat.terminal.screen import Screen
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.model.discovery import (
    describe,
    find_model_files,
    known_models,
    note_use,
    several_of_one_name,
)
from dsmoe_local.model.gguf_model import read_any_model, trained_context


def load_model(chat: Chat, options: ModelOptions) -> None:
    """Load a model in place of the current one, with progress on the screen. Raises as `reload` does."""
    loading = _Loading(chat.screen)
    try:
        chat.conversation.engine.reload(options, loading.listen)
    finally:
        chat.screen.live(None)


def _model(chat: Chat, word: str) -> None:
    if chat.conversation.engine.info.server:
        _model_of_server(chat, word)
        return
    if not word:
        _list(chat)
        return
    paths = find_model_files(word, chat.models_folder)
    if len(paths) > 1:
        chat.screen.notice(f"note: {several_of_one_name(paths)}")
    path = absolute(paths[0])
    engine = chat.conversation.engine
    if _same(path, engine.options.path):
        chat.screen.notice(f"{engine.info.name} is in use already")
        return
    options = _options(chat, path)

    def load() -> None:
        load_model(chat, options)
        note_use(path)

    chat.switch_model(load)


def _model_of_server(chat: Chat, word: str) -> None:
    """List the models of the server, or use another one of them."""
    engine = chat.conversation.engine
    if not word:
        assert isinstance(engine, RemoteEngine)
        names = engine.models()
        chat.screen.table((f"{'*' if name == engine.model else ' '}{safe_line(name, 80)}",) for name in names)
        return
    chat.switch_model(lambda: engine.reload(replace(engine.options, path=Path(word))))


def _options(chat: Chat, path: Path) -> ModelOptions:
    """Return how to load another model. A file that cannot be used is refused before anything is unloaded."""
    read_any_model(path)
    asked = chat.options
    n_context = asked.n_context
    if n_context is not None and (n_trained := trained_context(path, n_context)) < n_context:
        chat.screen.notice(f"note: the context has {n_trained:,} tokens: the model was trained for no more")
        n_context = n_trained
    if asked.chat_template is not None or asked.n_experts_per_token is not None:
        chat.screen.notice("note: --chat-template and --active-experts are not used with another model")
    return replace(asked, path=path, n_context=n_context, chat_template=None, n_experts_per_token=None)


def _list(chat: Chat) -> None:
    current = chat.conversation.engine.options.path
    models = [describe(model) for model in known_models(chat.models_folder)]
    chat.screen.table(
        (
            f"{'*' if _same(each.model.path, current) else ' '}{each.model.name}",
            each.type,
            format_size(each.n_bytes),
            each.reason or f"{each.n_context:,} tokens of context",
        )
        for each in models
    )
    if not models:
        chat.screen.notice("no other models are known: dsmoe pull downloads one")


def _same(first: Path, second: Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


class _Loading:
    """Shows the progress of loading where the live panel is, once for each percent."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._stage = ""
        self._done = self._total = self._shown = 0

    def listen(self, event: Event) -> None:
        """Handle a progress event, in any thread."""
        if isinstance(event, Note):
            self._screen.notice(f"note: {event.text}")
        elif isinstance(event, Started):
            self._stage, self._done, self._total, self._shown = event.stage, event.done, event.total, -1
        elif isinstance(event, Advanced):
            self._done += event.amount
        percent = 100 * self._done // max(1, self._total)
        if not isinstance(event, Finished) and percent != self._shown:
            self._shown = percent
            self._screen.live(Text(f"{safe_line(self._stage, 60)}: {percent}%", style="dim"))


def _complete(chat: Chat, typed: str) -> Iterable[str]:
    """Return the names of known models."""
    try:
        names = [model.name for model in known_models(chat.models_folder)]
    except DsmoeError:
        # Not reported while the user types: the command itself will fail.
        return []
    return [name for name in names if name.casefold().startswith(typed.casefold())]


COMMANDS: Commands = {
    "model": Command(
        _model,
        "list the models, or continue the conversation with another one",
        "[NAME|FILE]",
        complete=_complete,
        files=True,
    ),
}
