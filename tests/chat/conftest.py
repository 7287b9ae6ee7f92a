"""Session stores for the tests of chats: one, and another program's of the same folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
