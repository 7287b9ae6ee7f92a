"""A chat whose screen records what it is told to show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from dsmoe_local.base.config_file import ConfigFile
from dsmoe_local.chat.chat import Chat
from dsmoe_local.chat.conversation import Conversation
from dsmoe_local.chat.saving import CacheKeeper, Drafts
from dsmoe_local.chat.settings import ChatSettings
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.terminal.screen import Screen
from dsmoe_local.engine.interface import ReloadableEngine
from support.routed import ShowingScreen


class TalkingScreen(ShowingScreen):
    """A screen that also records replies, and whose editor returns `edited`."""

    edited: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.replies: list[str] = []
        self.echoed: list[str] = []
        self.reasonings: list[str] = []
        self.hidden: list[int] = []  # numbers of tokens of hidden reasoning
        self.went_on: list[str] = []  # the text that each reply continued

    def echo(self, message: str) -> None:
        self.echoed.append(message)

    @contextmanager
    def reply(self, after: str = "") -> Iterator[TalkingScreen]:
        self.replies.append("")
        self.went_on.append(after)
        yield self

    def progress(self, done: int, total: int) -> None:
        pass

    def reasoning(self, piece: str) -> None:
        self.reasonings.append(piece)

    def reasons(self, n_tokens: int) -> None:
        self.hidden.append(n_tokens)

    def reasoned(self, summary: str) -> None:
        self.notices.append(summary)

    def text(self, piece: str) -> None:
        self.replies[-1] += piece

    def note(self, text: str) -> None:
        self.notices.append(text)

    def edit(self, text: str) -> str | None:
        return self.edited

    @property
    def said(self) -> str:
        """Everything but the replies."""
        lines = [*self.notices, *(str(error) for error in self.errors)]
        return "\n".join([*lines, *("  ".join(row) for rows in self.tables for row in rows), *self.shown])


def chat_with(
    engine: ReloadableEngine,
    sessions: SessionStore | None = None,
    caches: CacheKeeper | None = None,
    *,
    drafts: Drafts | None = None,
    settings: ChatSettings | None = None,
) -> tuple[Chat, TalkingScreen]:
    """Return a new chat and its screen."""
    screen = TalkingScreen()
    chat = Chat(
        Conversation(engine, settings or ChatSettings()),
        cast(Screen, screen),
        ConfigFile(Path("/nowhere/config.toml")),
        sessions=sessions,
        caches=caches,
        drafts=drafts,
    )
    return chat, screen
