"""Session stores, one of them another program's of the same folder; scripted chats on a full terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.screens import ScreenTerminal, StartChat

from dsmoe_local.chat.store.sessions import SessionStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sessions"


@pytest.fixture
def store(folder: Path) -> Iterator[SessionStore]:
    opened = SessionStore.open(folder)
    yield opened
    opened.close()


@pytest.fixture
def other(folder: Path, store: SessionStore) -> Iterator[SessionStore]:
    opened = SessionStore.open(folder)
    yield opened
    opened.close()


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[StartChat]:
    """Start `support.terminal_chat`, or `code`, in the folder of the test."""
    with ExitStack() as started:

        def start(
            *arguments: str, code: str = "", columns: int = 80, lines: int = 24, **environment: str
        ) -> ScreenTerminal:
            command = ["-c", code] if code else ["-m", "support.terminal_chat", *arguments]
            terminal = ScreenTerminal(command, environment, columns=columns, lines=lines, folder=tmp_path)
            started.enter_context(terminal)
            terminal.wait_screen("context 0/2,048")
            return terminal

        yield start
