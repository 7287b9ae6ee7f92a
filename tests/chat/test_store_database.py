"""The session database as a file: who may read it, what it survives, refused versions, many threads."""

from __future__ import annotations

import sqlite3
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.stored import talk

from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.chat.store import database
from dsmoe_local.chat.store.records import seal_of
from dsmoe_local.chat.store.schema import APPLICATION_ID, MIGRATIONS
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.store.states import StateStore
from dsmoe_local.chat.turns import Role, Turn
from dsmoe_local.engine.types import FinishReason, Usage


def test_only_its_owner_can_read_it(folder: Path) -> None:
    """Guards: conversations that others on the machine can read, in the database or its log."""
    folder.mkdir(parents=True, mode=0o755)
    store = SessionStore.open(folder)
    store.create("m", "v", "").save(talk("secret"))
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [
        "sessions.db",
        "sessions.db-shm",
        "sessions.db-wal",
        "sessions.tally",
    ]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    store.close()
    store.close()
    (folder / "sessions.db").chmod(0o644)
    SessionStore.open(folder).close()
    assert stat.S_IMODE((folder / "sessions.db").stat().st_mode) == 0o600


def test_it_is_as_durable_as_sqlite_makes_it(store: SessionStore) -> None:
    """Guards: a setting that SQLite did not take: acknowledged turns lost with the power."""
    session = store.create("m", "v", "")
    for connection in (session._database._writer, session._database._reader):
        answers = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "fullfsync", "foreign_keys", "secure_delete")
        }
        assert answers == {
            "journal_mode": "wal", "synchronous": 3, "fullfsync": 1, "foreign_keys": 1, "secure_delete": 1
        }  # fmt: skip


def test_where_no_log_can_be_written_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a disk without shared memory, where a turn was acknowledged that a power cut takes back."""

    def connect(path: Path, **options: Any) -> sqlite3.Connection:
        # Locks that are files of their own: SQLite has no shared memory then.
        connection: sqlite3.Connection = real(f"file:{path}?vfs=unix-dotfile", uri=True, **options)
        return connection

    real = sqlite3.connect
    monkeypatch.setattr("sqlite3.connect", connect)
    store = SessionStore.open(folder)
    try:
        session = store.create("m", "v", "")
        session.save(talk("a", "b"))
        writer = session._database._writer
        assert writer.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert writer.execute("PRAGMA synchronous").fetchone() == (3,)
        assert store.find("1").load("v") == talk("a", "b")
        assert [hit.turn for hit in store.search("b")] == [2]
        store.delete(session)
    finally:
        store.close()


def test_the_first_session_is_in_folders_that_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: acknowledged turns in a folder whose own name a power cut takes away."""
    synced: list[Path] = []
    for module in ("dsmoe_local.base.durable", "dsmoe_local.chat.store.database"):
        monkeypatch.setattr(f"{module}.sync_folder", synced.append)
    SessionStore.open(folder / "deep").close()
    above = folder.parent.parent
    assert synced == [above, above / "data", folder, folder / "deep"]
    assert {stat.S_IMODE(each.stat().st_mode) for each in (folder.parent, folder)} == {0o700}


def test_a_full_disk_is_said_and_survived(store: SessionStore) -> None:
    """Guards: a save that is half done when there is no room for the rest."""
    session = store.create("m", "v", "")
    session.save(talk("a", "b"))
    connection = session._database._writer
    (n_pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {n_pages + 2}")
    with pytest.raises(Exception, match="the disk is full"):
        session.save(talk("a", "b", *["x" * 10_000] * 20))
    connection.execute("PRAGMA max_page_count = 1000000")
    assert session.save(talk("a", "b", "c")) is None
    assert store.find("chat-1").load("v") == talk("a", "b", "c")


def test_names_are_there_while_a_save_is_going_on(store: SessionStore) -> None:
    """Guards: completion that waits for the disk: keys would be late."""
    session = store.create("m", "v", "")
    session.save(talk("a", "b"))
    inside, seen = threading.Event(), threading.Event()
    names: list[str] = []

    def complete() -> None:
        inside.wait(60)
        names.extend(store.names())
        seen.set()

    thread = threading.Thread(target=complete)
    thread.start()
    with session._database.write() as connection:
        connection.execute("UPDATE session SET name = 'unseen'")
        inside.set()
        assert seen.wait(60)
        connection.execute("UPDATE session SET name = 'chat-1'")
    thread.join()
    assert names == ["chat-1"]


class _Interrupted(sqlite3.Connection):
    """Ctrl-C comes as soon as a transaction has begun, if one is `awaited`."""

    awaited = False

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        done = super().execute(*arguments)
        if self.awaited and self.in_transaction:
            self.awaited = False
            raise KeyboardInterrupt
        return done


def test_interrupted_when_a_transaction_has_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a transaction that stays open: nothing can be saved any more, by this chat or another."""
    connect = sqlite3.connect
    monkeypatch.setattr("sqlite3.connect", lambda path, **more: connect(path, factory=_Interrupted, **more))
    store = SessionStore.open(folder)
    try:
        session = store.create("m", "v", "")
        session.save(talk("a"))
        used: list[tuple[sqlite3.Connection, Callable[[], object]]] = [
            (session._database._writer, lambda: session.save(talk("a", "b"))),
            (session._database._reader, store.names),
        ]
        for connection, use in used:
            assert isinstance(connection, _Interrupted)
            connection.awaited = True
            with pytest.raises(KeyboardInterrupt):
                use()
            assert not connection.awaited, "nothing has begun"
            assert not connection.in_transaction
        assert store.find("1").load("v") == talk("a")
        session.save(talk("a", "b"))
        assert store.find("1").load("v") == talk("a", "b")
    finally:
        store.close()


def test_many_threads_save_at_once(store: SessionStore, other: SessionStore) -> None:
    """Guards: transactions of two threads that become one."""
    errors: list[BaseException] = []

    def chat(opened: SessionStore, word: str) -> None:
        try:
            session = opened.create("m", "v", "")
            for n_turns in range(1, 11):
                session.save(talk(*[word] * n_turns))
                opened.names()
                opened.search(word)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [
        threading.Thread(target=chat, args=(opened, word))
        for opened, word in ((store, "one"), (store, "two"), (other, "three"), (other, "four"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted((each.title, each.n_turns) for each in store.summaries()) == [
        ("four", 10), ("one", 10), ("three", 10), ("two", 10)
    ]  # fmt: skip
    assert all(len(store.search(word, 100)) == 10 for word in ("one", "two", "three", "four"))


def test_a_newer_database_is_left_alone(folder: Path) -> None:
    """Guards: an old program that damages what a newer one wrote."""
    SessionStore.open(folder).close()
    path = folder / database.FILE_NAME
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(FormatError) as error:
        SessionStore.open(folder)
    assert "newer version" in str(error.value)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before


def test_a_database_of_somebody_else_is_left_alone(folder: Path) -> None:
    """Guards: our tables put into a file that is none of ours."""
    folder.mkdir(parents=True)
    connection = sqlite3.connect(folder / database.FILE_NAME)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(FormatError, match="not a database of sessions"):
        SessionStore.open(folder)


def test_migration_is_all_or_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a database between two versions after a step that failed."""
    SessionStore.open(folder).close()
    steps = (*MIGRATIONS, ("CREATE TABLE more (x)", "CREATE TABLE broken ("))
    monkeypatch.setattr(database, "MIGRATIONS", steps)
    with pytest.raises(Exception, match="cannot be read or written"):
        SessionStore.open(folder)
    monkeypatch.setattr(database, "MIGRATIONS", (*steps[:-1], ("CREATE TABLE more (x)",)))
    store = SessionStore.open(folder)
    store.create("m", "v", "").save(talk("a"))
    store.close()


def test_a_database_of_the_first_version(folder: Path) -> None:
    """Guards: an upgrade that loses conversations, refuses them for what they could not have, or keeps states
    that nothing can read.
    """
    (folder / "states").mkdir(parents=True)
    old = folder / "states" / "0123456789abcdef.state"
    old.write_bytes(b"state")
    connection = sqlite3.connect(folder / database.FILE_NAME)
    for statement in MIGRATIONS[0]:
        connection.execute(statement)
    rows = [(1, None, 1, "user", "hello", None, None), (2, 1, 2, "assistant", "hi", b"\1\0\0\0", "stop")]
    connection.executemany(
        "INSERT INTO turn (id, parent, depth, role, content, token_ids, ending, tree, writer, vocabulary,"
        " created) VALUES (?, ?, ?, ?, ?, ?, ?, 1, 1, 'v', 1.0)",
        rows,
    )
    connection.execute(
        "INSERT INTO session VALUES (1, 'old', 'old', 1, 2, 7, 'system', 0, 0, 'hello', 'm', 1.0, 1.0)"
    )
    connection.execute("INSERT INTO state VALUES (?, 1, 'f', x'00000000', 5, zeroblob(32), 1.0)", (old.name,))
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    store = SessionStore.open(folder)
    session = store.find("old")
    transcript = session.load("v")
    assert [turn.content for turn in transcript.turns] == ["hello", "hi"]
    assert transcript.turns[1].token_ids == (1,)
    assert (session.model_path, session.settings) == (None, None)
    assert session.save(replace(transcript, turns=transcript.turns[:0], undone=transcript.turns)) is None
    assert store.find("old").load("v").undone == transcript.turns
    assert store.problems() == []
    store.close()
    StateStore(folder).tidy()
    assert not old.exists()


def test_a_database_of_the_second_version(folder: Path) -> None:
    """Guards: rows from before reasoning was stored refused for their checksums or their usage."""
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / database.FILE_NAME)
    for statement in (*MIGRATIONS[0], *MIGRATIONS[1]):
        connection.execute(statement)
    usage = (
        '{"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 1, "prompt_seconds": 0.5, '
        '"completion_seconds": 0.5, "seed": null}'
    )
    replied = ("assistant", "hi", b"\1\0\0\0", "v", "stop", usage)
    rows = [
        (None, 1, 1, 1.0, "user", "hello", None, None, None, None),
        (1, 1, 2, 1.0, *replied),
        (2, 1, 3, 1.0, "user", "and?", None, None, None, None),
    ]
    for row in rows:
        connection.execute(
            "INSERT INTO turn (writer, parent, tree, depth, created, role, content, token_ids, vocabulary,"
            " ending, usage, seal) VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, seal_of(row)),
        )
    session = (1, "old", "old", 1, 3, 7, "", 0, 0, "hello", "m", 1.0, None, None, None)
    connection.execute(
        "INSERT INTO session (number, name, key, tree, head, revision, system, n_left_out, n_shifted, title,"
        " model, updated, undone, model_path, settings, created, seal)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1.0, ?)",
        (*session, seal_of(session)),
    )
    connection.execute(
        "INSERT INTO draft VALUES (1, ?, ?, ?, ?, ?, ?, ?)", (*replied, seal_of((1, *replied)))
    )
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute("PRAGMA user_version = 2")
    connection.commit()
    connection.close()
    store = SessionStore.open(folder)
    transcript = store.find("old").load("v")
    assert [turn.content for turn in transcript.turns] == ["hello", "hi", "and?", "hi"]
    assert [turn.reasoning for turn in transcript.turns] == [""] * 4
    assert transcript.turns[1].usage == transcript.turns[3].usage == Usage(3, 0, 1, 0.5, 0.5, None)
    more = Turn(Role.ASSISTANT, "yes", (2,), FinishReason.STOP, None, "hm")
    opened = store.find("old")
    opened.load("v")
    opened.save(replace(transcript, turns=(*transcript.turns, Turn(Role.USER, "why?"), more)))
    assert store.find("old").load("v").turns[-1] == more
    assert store.problems() == []
    store.close()
    # Damage to reasoning is found, also if nothing is left of it.
    connection = sqlite3.connect(folder / database.FILE_NAME)
    connection.execute("UPDATE turn SET reasoning = NULL WHERE reasoning = 'hm'")
    connection.commit()
    connection.close()
    store = SessionStore.open(folder)
    with pytest.raises(FormatError, match="wrong checksum"):
        store.find("old").load("v")
    store.close()


def test_a_database_that_was_moved_away_is_not_missed(folder: Path) -> None:
    """Guards: a warning of lost turns for somebody who did what an error told them: move the file away."""
    store = SessionStore.open(folder)
    store.create("m", "v", "").save(talk("a", "b"))
    store.close()
    (folder / database.FILE_NAME).rename(folder / "damaged.db")
    store = SessionStore.open(folder)
    assert store.problems() == []
    store.close()
    # An older copy in its place is missed.
    store = SessionStore.open(folder)
    for _ in range(3):
        store.create("m", "v", "").save(talk("a", "b"))
    store.close()
    (folder / "damaged.db").replace(folder / database.FILE_NAME)
    store = SessionStore.open(folder)
    assert [problem[:27] for problem in store.problems()] == ["the last changes are lost: "]
    store.create("m", "v", "").save(talk("a", "b"))
    assert store.problems() == []
    store.close()


def test_what_counts_transactions_is_not_needed(folder: Path, store: SessionStore) -> None:
    """Guards: a turn that is durable told as an error, since a file beside it cannot be written."""
    tally = folder / "sessions.tally"
    tally.unlink(missing_ok=True)
    tally.mkdir()
    session = store.create("m", "v", "")
    assert session.save(talk("a", "b")) is None
    assert store.problems() == []
    assert len(store.find("1").load("v").turns) == 2


def test_a_check_can_be_stopped(store: SessionStore) -> None:
    """Guards: Ctrl-C while the model is loaded that waits until a large database is checked."""
    session = store.create("m", "v", "")
    session.save(talk(*["a", "b"] * 500))
    stop = threading.Event()
    assert store.problems(stop) == []
    stop.set()
    with pytest.raises(FileError, match="interrupted"):
        store.problems(stop)
