"""KV states beside the sessions: blocks written once, removed when damaged, capped; never an error."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.stored import talk

from dsmoe_local.base.durable import locked
from dsmoe_local.base.errors import NoSpaceError
from dsmoe_local.chat.store import states as module
from dsmoe_local.chat.store.sessions import Session, SessionStore
from dsmoe_local.chat.store.states import BLOCK, StateStore
from dsmoe_local.engine.errors import EngineCrashError

IDS = tuple(range(100, 100 + 3 * BLOCK))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    opened = SessionStore.open(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def states(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path)


def stored(store: SessionStore) -> Session:
    session = store.create("m", "v", "")
    session.save(talk("a", "b"))
    return session


class Writer:
    """An engine that holds `n_held` tokens; `blocks` are those that were written, by their ends."""

    def __init__(self, content: bytes = b"state", n_held: int = len(IDS)) -> None:
        self.content = content
        self.n_held = n_held
        self.blocks: list[int] = []

    def __call__(self, path: Path, start: int, end: int) -> int:
        assert not path.exists()
        assert end - start == BLOCK
        if self.n_held <= start:
            return 0
        path.write_bytes(self.content + b" %d" % end)
        self.blocks.append(end)
        return min(end, self.n_held)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "states").iterdir())


def found(states: StateStore, session: Session, fingerprint: str, ids: Sequence[int]) -> list[bytes]:
    return [path.read_bytes() for path in states.find(session.number, fingerprint, ids)]


def test_a_state_comes_back(store: SessionStore, states: StateStore, tmp_path: Path) -> None:
    """Guards: a state that others can read, or is not found, or found out of order."""
    session = stored(store)
    assert states.find(session.number, "f", IDS) == []
    # What is behind the last whole block is not kept.
    assert states.keep(session.number, "f", (*IDS, 1, 2), Writer()) == len(IDS)
    paths = states.find(session.number, "f", (*IDS, 7, 8))
    assert [path.read_bytes() for path in paths] == [b"state %d" % (BLOCK * n) for n in (1, 2, 3)]
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert files(tmp_path) == sorted(path.name for path in paths)


def test_only_what_is_new_is_written(store: SessionStore, states: StateStore, tmp_path: Path) -> None:
    """Guards: hundreds of megabytes written anew with every reply, or by every fork."""
    session, writer = stored(store), Writer(n_held=10_000)
    assert states.keep(session.number, "f", IDS, writer) == len(IDS)
    assert states.keep(session.number, "f", IDS, writer) == len(IDS)
    longer = (*IDS, *range(BLOCK + 5))
    assert states.keep(session.number, "f", longer, writer) == 4 * BLOCK
    assert states.keep(store.fork(session).number, "f", longer, writer) == 4 * BLOCK
    assert writer.blocks == [BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK]
    # Another reply to the same message: what is before it stays, what it replaces goes.
    other = (*IDS[: 2 * BLOCK], *range(2 * BLOCK))
    assert states.keep(session.number, "f", other, writer) == 4 * BLOCK
    assert writer.blocks[4:] == [3 * BLOCK, 4 * BLOCK]
    assert len(files(tmp_path)) == 4
    assert len(states.find(session.number, "f", longer)) == 2


def test_keeping_gives_way(store: SessionStore, states: StateStore) -> None:
    """Guards: a message that waits until all of a cache is written."""
    session, writer = stored(store), Writer()
    assert states.keep(session.number, "f", IDS, writer, stop=lambda: len(writer.blocks) == 2) == 2 * BLOCK
    assert len(states.find(session.number, "f", IDS)) == 2
    assert states.keep(session.number, "f", IDS, writer, stop=lambda: True) == 2 * BLOCK
    assert states.keep(session.number, "f", IDS, writer) == len(IDS)
    assert writer.blocks == [BLOCK, 2 * BLOCK, 3 * BLOCK]


def test_a_state_is_of_its_session_its_settings_and_its_tokens(
    store: SessionStore, states: StateStore
) -> None:
    """Guards: a cache of other weights or another text behind a conversation."""
    session, other = stored(store), stored(store)
    states.keep(session.number, "f", IDS, Writer())
    assert states.find(session.number, "g", IDS) == []
    assert states.find(other.number, "f", IDS) == []
    assert states.find(99, "f", IDS) == []
    assert states.find(session.number, "f", (0, *IDS[1:])) == []
    assert states.find(session.number, "f", ()) == []
    # Half of it is wanted: better than nothing.
    assert len(states.find(session.number, "f", (*IDS[: BLOCK + 9], 0, 0))) == 1
    assert len(states.find(session.number, "f", IDS)) == 3


def test_only_what_was_held_is_recorded(store: SessionStore, states: StateStore, tmp_path: Path) -> None:
    """Guards: a state of a beginning taken for the whole."""
    session = stored(store)
    assert states.keep(session.number, "f", IDS, Writer(n_held=2 * BLOCK - 1)) == BLOCK
    assert len(files(tmp_path)) == 1
    assert states.keep(session.number, "f", IDS, Writer()) == len(IDS)
    assert len(found(states, session, "f", IDS)) == 3
    # What has become of no use goes also where the engine has not all of what takes its place.
    other = (*IDS[:BLOCK], *range(2 * BLOCK))
    assert states.keep(session.number, "f", other, Writer(n_held=len(IDS) - 1)) == 2 * BLOCK
    assert len(files(tmp_path)) == 2


def test_forks_share_their_states(store: SessionStore, states: StateStore) -> None:
    """Guards: a fork of a long conversation that is read again."""
    session = stored(store)
    states.keep(session.number, "f", IDS, Writer(b"original"))
    fork = store.fork(session)
    assert len(found(states, fork, "f", IDS)) == 3
    own = (*IDS[:BLOCK], *range(BLOCK))
    states.keep(fork.number, "f", own, Writer(b"fork"))
    assert [content.split()[0] for content in found(states, fork, "f", own)] == [b"original", b"fork"]
    assert len(found(states, session, "f", IDS)) == 3
    store.delete(session)
    # What is behind a block that is gone is of no use before that is written again.
    assert found(states, fork, "f", own) == []
    states.keep(fork.number, "f", own, Writer(b"again"))
    assert [content.split()[0] for content in found(states, fork, "f", own)] == [b"again", b"fork"]


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 10_000), change=st.sampled_from(["flip", "cut", "grow", "gone", "folder"]))
def test_damage_is_removed_without_a_word(
    store: SessionStore, states: StateStore, tmp_path: Path, place: int, change: str
) -> None:
    """Guards: damaged bytes given to native code."""
    session = stored(store)
    states.keep(session.number, "f", IDS, Writer(bytes(range(256)) * 20))
    _, path, _ = states.find(session.number, "f", IDS)
    content = bytearray(path.read_bytes())
    place %= len(content)
    if change == "flip":
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
    elif change == "cut":
        path.write_bytes(content[:place])
    elif change == "grow":
        path.write_bytes(content + b"\0")
    else:
        path.unlink()
    if change == "folder":
        path.mkdir()
    assert len(states.find(session.number, "f", IDS)) == 1
    if change == "folder":
        path.rmdir()
    assert not path.exists()
    writer = Writer()
    assert states.keep(session.number, "f", IDS, writer) == len(IDS)
    assert writer.blocks == [2 * BLOCK]
    assert len(states.find(session.number, "f", IDS)) == 3


def test_what_cannot_be_kept_is_not(
    store: SessionStore, states: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an error, or a file that stays, when there is nothing to keep, no session, or no room."""
    session = stored(store)

    def fail(path: Path, start: int, end: int) -> int:
        path.write_bytes(b"half")
        raise NoSpaceError("full")

    def crash(path: Path, start: int, end: int) -> int:
        path.write_bytes(b"half")
        raise EngineCrashError("crashed")

    def fail_otherwise(path: Path, start: int, end: int) -> int:
        raise OSError(28, "full")

    assert not states.keep(session.number, "f", IDS, lambda path, start, end: 0)
    assert not states.keep(session.number, "f", IDS, fail)
    assert not states.keep(session.number, "f", IDS, crash)
    assert not states.keep(session.number, "f", IDS, fail_otherwise)
    assert not states.keep(99, "f", IDS, Writer())
    assert not StateStore(tmp_path, cap_bytes=4).keep(session.number, "f", IDS, Writer(b"12345"))
    assert files(tmp_path) == []
    free = type("Usage", (), {"free": module.SPARE_BYTES - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    assert not states.keep(session.number, "f", IDS, Writer())
    monkeypatch.undo()

    def write_while_it_is_deleted(path: Path, start: int, end: int) -> int:
        store.delete(session)
        return Writer()(path, start, end)

    assert not states.keep(session.number, "f", IDS, write_while_it_is_deleted)
    assert files(tmp_path) == []


def test_room_is_judged_by_what_earlier_states_took(
    store: SessionStore, states: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a disk filled by a state that is known to be large."""
    session, other = stored(store), stored(store)
    states.keep(session.number, "f", IDS[:BLOCK], Writer(b"x" * 6397))
    for n_free in (6399, 6400):
        free = type("Usage", (), {"free": module.SPARE_BYTES + n_free})
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: free)
        n_stored = states.keep(other.number, "f", IDS, Writer())
        assert n_stored == (len(IDS) if n_free == 6400 else 0)


def test_the_cap_holds_and_the_oldest_goes_first(
    store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a disk that fills up with caches; the one just written thrown away."""
    clock = iter(range(1, 1000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    states = StateStore(tmp_path, cap_bytes=30)
    sessions = [stored(store) for _ in range(4)]
    ids = IDS[:BLOCK]
    for session in sessions[:3]:
        states.keep(session.number, "f", ids, Writer(b"x" * 7))
    assert states.find(sessions[0].number, "f", ids)  # used again: the second is the oldest now
    states.keep(sessions[3].number, "f", ids, Writer(b"x" * 7))
    kept = [bool(states.find(session.number, "f", ids)) for session in sessions]
    assert kept == [True, False, True, True]
    StateStore(tmp_path, cap_bytes=15).tidy()
    assert len(files(tmp_path)) == 1
    assert states.find(sessions[3].number, "f", ids)


def test_one_conversation_keeps_its_beginning(store: SessionStore, tmp_path: Path) -> None:
    """Guards: blocks kept without those before them; a conversation above the cap written every time."""
    session, writer = stored(store), Writer(b"x" * 6)
    states = StateStore(tmp_path, cap_bytes=25)
    assert states.keep(session.number, "f", IDS, writer) == 2 * BLOCK
    assert states.keep(session.number, "f", IDS, writer) == 2 * BLOCK
    assert writer.blocks == [BLOCK, 2 * BLOCK]
    StateStore(tmp_path, cap_bytes=12).tidy()
    assert len(states.find(session.number, "f", IDS)) == 1


def test_deleting_a_session_takes_its_states(store: SessionStore, states: StateStore, tmp_path: Path) -> None:
    """Guards: gigabytes, and what was said, left of a deleted conversation."""
    session, other = stored(store), stored(store)
    states.keep(session.number, "f", IDS, Writer())
    states.keep(session.number, "g", IDS, Writer())
    states.keep(other.number, "f", IDS, Writer())
    store.delete(session)
    assert len(files(tmp_path)) == 3
    assert len(states.find(other.number, "f", IDS)) == 3


def test_tidying_takes_orphans_but_not_what_is_being_written(
    store: SessionStore, states: StateStore, tmp_path: Path
) -> None:
    """Guards: leftovers of crashes for ever; a state of another chat removed under its hands."""
    session = stored(store)
    states.keep(session.number, "f", IDS[:BLOCK], Writer())
    folder = tmp_path / "states"
    (kept,) = files(tmp_path)
    theirs = ["mine.state", "notes.txt"]
    a, b, c, d = (f"{letter * 16}.state" for letter in "abcd")
    for name in (a, f"{b}.part", f".{c}.lock", *theirs):
        (folder / name).write_bytes(b"")
    child = "; ".join(
        (
            "import sys, pathlib",
            "from dsmoe_local.base.durable import locked",
            "path = pathlib.Path(sys.argv[1])",
            "lock = locked(path)",
            "lock.__enter__()",
            "path.with_name(path.name + '.part').write_bytes(b'half')",
            "print('writing', flush=True)",
            "sys.stdin.read()",
        )
    )
    with subprocess.Popen(
        [sys.executable, "-c", child, str(folder / d)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writing:
        assert writing.stdout is not None
        assert writing.stdout.readline() == b"writing\n"
        states.tidy()
        assert files(tmp_path) == sorted([f".{d}.lock", f"{d}.part", kept, *theirs])
        writing.kill()
    states.tidy()
    assert files(tmp_path) == sorted([kept, *theirs])
    (folder / kept).unlink()
    states.tidy()
    assert states.find(session.number, "f", IDS) == []


def test_a_state_is_not_an_orphan_before_it_is_recorded(
    store: SessionStore, states: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: tidying in the moment between a state's rename and its row."""
    session = stored(store)
    monkeypatch.setattr(module, "reach", lambda point: StateStore(tmp_path).tidy())
    assert states.keep(session.number, "f", IDS, Writer()) == len(IDS)
    assert len(states.find(session.number, "f", IDS)) == 3
    with locked(tmp_path / "states" / f"{'e' * 16}.state"):
        states.tidy()


def test_a_state_that_is_there_already_is_used_anew(
    store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: the state of the chat that is open taken for the oldest."""
    clock = iter(range(1, 1000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    states = StateStore(tmp_path, cap_bytes=25)
    first, second, third = (stored(store) for _ in range(3))
    for session in (first, second, first, third):
        assert states.keep(session.number, "f", IDS[:BLOCK], Writer(b"x" * 7)) == BLOCK
    kept = [bool(states.find(session.number, "f", IDS)) for session in (first, second, third)]
    assert kept == [True, False, True]
