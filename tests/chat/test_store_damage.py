"""A damaged session database: a short message that names it, or what is whole in it; never a crash."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
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


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    opened = SessionStore.open(tmp_path / "sessions")
    yield opened
    opened.close()


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


TURN = (
    "role = 'nobody'", "token_ids = x'010203'", "token_ids = x'000000ff'", "ending = 'never'", "usage = '{'",
    "usage = '{\"x\": 1}'", "usage = '3'", "token_ids = 'text'", "token_ids = 5", "content = x'ff00'",
    "content = CAST(x'ff' AS TEXT)", "usage = x'00'", "depth = 'two'",
    "usage = replace(usage, '12', '\"twelve\"')", "usage = replace(usage, '0.25', 'NaN')",
    "usage = replace(usage, '7', '-7')", "parent = NULL", "parent = 5", "tree = 99", "depth = 7",
    "vocabulary = x'76'", "created = 'now'", "created = 1e20",
)  # fmt: skip
SESSION = (
    "updated = 1e20", "updated = 'now'", "updated = -1.0", "updated = 9e999", "name = x'6368'",
    "title = x'00'",
    "n_left_out = 'a'", "n_left_out = -1", "n_shifted = 0.5", "model = x'00'", "system = x'00'",
    "revision = 'r'", "tree = 'x'", "head = 'x'", "head = 0.5", "tree = 99", "key = x'00'",
    "name = CAST(x'ff' AS TEXT)",
)  # fmt: skip


def damage_rows(folder: Path, *statements: str) -> None:
    """Change the database as no rule of its allows."""
    connection = sqlite3.connect(folder / "sessions.db")
    try:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        *(f"UPDATE turn SET {change} WHERE depth = 2" for change in TURN),
        *(f"UPDATE session SET {change} WHERE number = 1" for change in SESSION),
    ],
)
def test_a_row_that_makes_no_sense(sound: Path, tmp_path: Path, statement: str) -> None:
    """Guards: values that only a damaged or foreign database has, met where a row is read: a traceback."""
    folder = tmp_path / "sessions"
    shutil.copytree(sound, folder)
    damage_rows(folder, statement)
    store = SessionStore.open(folder)
    try:
        with pytest.raises(FormatError, match="is damaged") as error:
            store.find("chat-1").load("v")
        assert str(folder / "sessions.db") in str(error.value)
        for use_it in (
            lambda: [datetime.fromtimestamp(each.updated) for each in store.summaries()],
            lambda: [datetime.fromtimestamp(each.when) for each in store.search("turn", 1000)],
            lambda: store.latest(),
            lambda: store.names(),
        ):
            with contextlib.suppress(DsmoeError):
                use_it()
    finally:
        store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE turn SET parent = 2 WHERE id = 1",
        "UPDATE turn SET parent = 1, depth = 5 WHERE id = 1",
        "UPDATE turn SET parent = 3 - id, depth = 1e300 WHERE id < 3",
        "UPDATE turn SET parent = 3 - id, depth = 'x' WHERE id < 3",
    ],
)
def test_parents_in_a_circle(tmp_path: Path, statement: str) -> None:
    """Guards: a session whose turns have no beginning: read for ever, into a file that fills the disk."""
    store = SessionStore.open(tmp_path)
    try:
        store.create("m", "v", "").save(talk("hello", "hi"))
        damage_rows(tmp_path, statement)
        with pytest.raises(FormatError, match="is damaged"):
            store.find("1").load("v")
        with contextlib.suppress(DsmoeError):
            store.search("hello")
        # It can be got rid of.
        store.delete(store.find("1"))
        assert store.names() == []
    finally:
        store.close()


def test_rules_of_the_tables(sound: Path, tmp_path: Path) -> None:
    """Guards: a program that writes another type, or a path in place of a state's file."""
    folder = tmp_path / "sessions"
    shutil.copytree(sound, folder)
    connection = sqlite3.connect(folder / "sessions.db")
    state = "INSERT INTO state VALUES ({}, 1, 'f', zeroblob(32), 64, 1, zeroblob(32), 1.0)"
    try:
        connection.execute(state.format("'0123456789abcdef.state'"))
        for statement in (
            "UPDATE turn SET content = x'00'",
            "UPDATE turn SET parent = NULL WHERE depth = 2",
            "UPDATE session SET n_left_out = 'a'",
            "UPDATE session SET updated = 'now'",
            "UPDATE state SET n_bytes = 'abc'",
            *map(
                state.format,
                ("'../victim'", "'0123456789abcdeg.state'", "x'00'", "'/0123456789abcdef.state'"),
            ),
            state.format("'0123456789abcdef.state' || char(0) || '/../../victim'"),
        ):
            with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
                connection.execute(statement)
    finally:
        connection.close()


def test_an_unfinished_reply_with_turns_undone_behind_it(store: SessionStore, tmp_path: Path) -> None:
    """Guards: a traceback for two rows that make sense alone and not together."""
    session = store.create("m", "v", "")
    whole = talk("a", "b", "c", "d")
    session.save(replace(whole, turns=whole.turns[:2], undone=whole.turns[2:]))
    damage_rows(
        tmp_path / "sessions",
        f"INSERT INTO draft (session, role, content) VALUES ({session.number}, 'assistant', 'so far')",
    )
    with pytest.raises(FormatError, match="is damaged: an unfinished reply has undone turns") as error:
        store.find(session.name).load("v")
    assert len(str(error.value).splitlines()) == 3


IDS = tuple(range(64))
STATE = (
    "file = '../../victim'", "file = '{victim}'", "file = CAST('{victim}' AS BLOB)", "file = 5",
    "file = '0123456789abcdef.state' || char(0) || '/../../victim'", "file = NULL", "n_bytes = 'abc'",
    "n_bytes = -1", "prefix = 5", "prefix = 'ab'", "prefix = x'00'", "n_tokens = 0", "digest = 'd'",
    "digest = x'00'", "file = CAST(x'ff' AS TEXT)", "used = 'now'", "fingerprint = x'66'",
)  # fmt: skip


@pytest.mark.parametrize(
    ("first", "change"),
    [
        *(("find", change) for change in STATE),
        *((first, change) for first in ("keep", "tidy", "delete") for change in STATE[:5]),
    ],
)
def test_a_state_row_that_makes_no_sense_goes(
    store: SessionStore, tmp_path: Path, first: str, change: str
) -> None:
    """Guards: a path in the database, whose file is taken for a state and deleted; types that raise."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    session = store.create("m", "v", "")
    session.save(talk("a", "b"))
    states = StateStore(tmp_path / "sessions")

    def write(path: Path, start: int, end: int) -> int:
        path.write_bytes(b"state")
        return end

    states.keep(session.number, "f", IDS, write)
    damage_rows(tmp_path / "sessions", f"UPDATE state SET {change.format(victim=victim)}")
    if first == "find":
        found = states.find(session.number, "f", IDS)
        assert [path.read_bytes() for path in found] in ([], [b"state"])
    elif first == "keep":
        assert states.keep(session.number, "f", IDS, write)
    elif first == "delete":
        store.delete(session)
    states.tidy()
    assert victim.read_bytes() == b"precious"
    connection = sqlite3.connect(tmp_path / "sessions" / "sessions.db")
    rows = connection.execute("SELECT file FROM state").fetchall()
    connection.close()
    # Of the file, too, nothing is left.
    assert [(path.name,) for path in (tmp_path / "sessions" / "states").iterdir()] == rows
    assert len(rows) == (first == "keep")
