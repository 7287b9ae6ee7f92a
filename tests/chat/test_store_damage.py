"""A damaged session database: a short message that names it, or what is whole in it; never a crash."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from support.stored import talk

from dsmoe_local.base.errors import DsmoeError, FileError, FormatError
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.store.states import StateStore

N_DAMAGES = int(os.environ.get("STORE_DAMAGES", "40"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some sessions in it."""
    folder = tmp_path_factory.mktemp("sound") / "sessions"
    store = SessionStore.open(folder)
    for number in range(10):
        session = store.create("m", "v", "system")
        session.save(talk(*[f"turn {number} 专家 " * 40] * 6, system="system"))
        store.fork(session)
    store.close()
    return folder


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    """Guards: SQLite's own words and a traceback for a file that something else has overwritten."""
    path = tmp_path / "sessions.db"
    path.write_bytes(b"not a database at all " * 500)
    for opening in (SessionStore.open, lambda folder: StateStore(folder).tidy()):
        with pytest.raises(FormatError) as error:
            opening(tmp_path)
        assert str(error.value).splitlines() == [
            "the database of sessions is damaged: file is not a database",
            str(path),
            "move it away, or chat with --no-history",
        ]
    assert path.read_bytes() == b"not a database at all " * 500


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    """Guards: a traceback where a folder or file stands in the way."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match="cannot be opened"):
        SessionStore.open(tmp_path / "file" / "sessions")
    (tmp_path / "sessions.db").mkdir()
    with pytest.raises(FileError, match="cannot be"):
        SessionStore.open(tmp_path)


def overwrite(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = generator.randrange(len(content))
    n_bytes = generator.choice((1, 16, 4096))
    content[at : at + n_bytes] = generator.randbytes(len(content[at : at + n_bytes]))
    path.write_bytes(content)


def cut(path: Path, generator: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: generator.randrange(len(content))])


@pytest.mark.parametrize("damage", [overwrite, cut])
def test_damage_is_said_or_does_no_harm(
    sound: Path, tmp_path: Path, damage: Callable[[Path, random.Random], None]
) -> None:
    """Guards: an exception of SQLite or Python's that gets through, from wherever the damage is."""
    generator = random.Random(int(os.environ.get("STORE_SEED", "7")))
    n_refused = n_sound = 0
    for number in range(N_DAMAGES):
        folder = tmp_path / str(number)
        shutil.copytree(sound, folder)
        damage(folder / "sessions.db", generator)
        try:
            use(folder)
        except DsmoeError as error:
            lines = str(error).splitlines()
            n_refused += len(lines) == 3 and lines[1] == str(folder / "sessions.db")
        else:
            n_sound += 1
        shutil.rmtree(folder)
    assert n_refused + n_sound == N_DAMAGES
    assert n_refused > N_DAMAGES // 10


def use(folder: Path) -> None:
    """Everything once."""
    store = SessionStore.open(folder)
    try:
        for name in store.names():
            session = store.find(name)
            transcript = session.load("v")
            session.save(talk(*(turn.content for turn in transcript.turns), "more"))
        store.summaries()
        store.search("专家 turn")
        latest = store.latest()
        if latest is not None:
            store.delete(latest)
        StateStore(folder).tidy()
    finally:
        store.close()


@pytest.mark.parametrize(
    "change",
    [
        "role = 'nobody'", "token_ids = x'010203'", "ending = 'never'", "usage = '{'", "usage = '{\"x\": 1}'",
        "usage = '3'", "token_ids = 'text'", "content = x'ff00'", "content = CAST(x'ff' AS TEXT)",
    ],
)  # fmt: skip
def test_a_row_that_makes_no_sense(sound: Path, tmp_path: Path, change: str) -> None:
    """Guards: values that only a damaged or foreign database has, met where a turn is read."""
    folder = tmp_path / "sessions"
    shutil.copytree(sound, folder)
    connection = sqlite3.connect(folder / "sessions.db")
    connection.execute(f"UPDATE turn SET {change} WHERE depth = 2")
    connection.commit()
    connection.close()
    store = SessionStore.open(folder)
    try:
        with pytest.raises(DsmoeError) as error:
            store.find("chat-1").load("v")
        assert str(folder / "sessions.db") in str(error.value)
    finally:
        store.close()
