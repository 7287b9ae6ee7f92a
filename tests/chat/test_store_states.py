"""KV states beside the sessions: found when they help, removed when damaged, capped; never an error."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.stored import talk

from dsmoe_local.base.durable import locked
from dsmoe_local.base.errors import NoSpaceError
from dsmoe_local.chat.store import states as module
from dsmoe_local.chat.store.sessions import Session, SessionStore
from dsmoe_local.chat.store.states import StateStore
from dsmoe_local.engine.errors import EngineCrashError

IDS = tuple(range(100, 164))


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


def writer(content: bytes = b"state", n_tokens: int = len(IDS)) -> Callable[[Path], int]:
    def write(path: Path) -> int:
        assert not path.exists()
        path.write_bytes(content)
        return n_tokens

    return write


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "states").iterdir())


def test_a_state_comes_back(store: SessionStore, states: StateStore, tmp_path: Path) -> None:
    """Guards: a state that others can read, is written again, or is not found."""
    session = stored(store)
    assert states.find(session.number, "f", IDS) is None
    assert states.keep(session.number, "f", IDS, writer())
    path = states.find(session.number, "f", (*IDS, 7, 8))
    assert path is not None
    assert path.read_bytes() == b"state"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert files(tmp_path) == [path.name]

    def never(path: Path) -> int:
        raise AssertionError

    assert states.keep(session.number, "f", IDS, never)


def test_a_state_is_of_its_session_its_settings_and_its_tokens(
    store: SessionStore, states: StateStore
) -> None:
    """Guards: a cache of other weights or another text behind a conversation."""
    session, other = stored(store), stored(store)
    states.keep(session.number, "f", IDS, writer())
    assert states.find(session.number, "g", IDS) is None
    assert states.find(other.number, "f", IDS) is None
    assert states.find(99, "f", IDS) is None
    assert states.find(session.number, "f", (0, *IDS[1:])) is None
    assert states.find(session.number, "f", ()) is None
    # Half of it is wanted: better than nothing; a few tokens are not.
    assert states.find(session.number, "f", (*IDS[:32], 0, 0)) is not None
    assert states.find(session.number, "f", (*IDS[: module.MIN_TOKENS - 1], 0)) is None
    assert states.find(session.number, "f", IDS) is not None


def test_only_what_was_held_is_recorded(store: SessionStore, states: StateStore) -> None:
    """Guards: a state of a beginning taken for the whole."""
    session = stored(store)
    assert states.keep(session.number, "f", IDS, writer(b"half", 32))
    assert states.find(session.number, "f", (*IDS[:32], 0)) is not None
    assert states.keep(session.number, "f", IDS, writer(b"whole"))
    path = states.find(session.number, "f", IDS)
    assert path is not None
    assert path.read_bytes() == b"whole"


def test_a_new_state_takes_the_old_ones_place(
    store: SessionStore, states: StateStore, tmp_path: Path
) -> None:
    """Guards: a state for every reply ever given; those of another model's settings thrown away."""
    session = stored(store)
    states.keep(session.number, "f", IDS, writer(b"1"))
    states.keep(session.number, "g", IDS, writer(b"2"))
    states.keep(session.number, "f", (*IDS, 1), writer(b"3", len(IDS) + 1))
    assert len(files(tmp_path)) == 2
    path, other = states.find(session.number, "f", (*IDS, 1)), states.find(session.number, "g", IDS)
    assert path is not None
    assert other is not None
    assert (path.read_bytes(), other.read_bytes()) == (b"3", b"2")


def test_forks_share_their_states(store: SessionStore, states: StateStore) -> None:
    """Guards: a fork of a long conversation that is read again."""
    session = stored(store)
    states.keep(session.number, "f", IDS, writer(b"original"))
    fork = store.fork(session)
    path = states.find(fork.number, "f", IDS)
    assert path is not None
    assert path.read_bytes() == b"original"
    states.keep(fork.number, "f", IDS[:40], writer(b"fork", 40))
    path = states.find(fork.number, "f", IDS)
    assert path is not None
    assert path.read_bytes() == b"original"  # more of it is wanted
    store.delete(session)
    path = states.find(fork.number, "f", IDS)
    assert path is not None
    assert path.read_bytes() == b"fork"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 10_000), change=st.sampled_from(["flip", "cut", "grow", "gone", "folder"]))
def test_damage_is_removed_without_a_word(
    store: SessionStore, states: StateStore, tmp_path: Path, place: int, change: str
) -> None:
    """Guards: damaged bytes given to native code."""
    session = stored(store)
    states.keep(session.number, "f", IDS, writer(bytes(range(256)) * 20))
    path = states.find(session.number, "f", IDS)
    assert path is not None
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
    assert states.find(session.number, "f", IDS) is None
    if change == "folder":
        path.rmdir()
    assert not path.exists()
    assert states.keep(session.number, "f", IDS, writer())
    assert states.find(session.number, "f", IDS) is not None


def test_what_cannot_be_kept_is_not(
    store: SessionStore, states: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: an error, or a file that stays, when there is nothing to keep, no session, or no room."""
    session = stored(store)

    def fail(path: Path) -> int:
        path.write_bytes(b"half")
        raise NoSpaceError("full")

    def crash(path: Path) -> int:
        path.write_bytes(b"half")
        raise EngineCrashError("crashed")

    def fail_otherwise(path: Path) -> int:
        raise OSError(28, "full")

    assert not states.keep(session.number, "f", IDS, lambda path: 0)
    assert not states.keep(session.number, "f", IDS, fail)
    assert not states.keep(session.number, "f", IDS, crash)
    assert not states.keep(session.number, "f", IDS, fail_otherwise)
    assert not states.keep(99, "f", IDS, writer())
    assert not StateStore(tmp_path, cap_bytes=4).keep(session.number, "f", IDS, writer(b"12345"))
    assert files(tmp_path) == []
    free = type("Usage", (), {"free": module.SPARE_BYTES - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    assert not states.keep(session.number, "f", IDS, writer())
    monkeypatch.undo()

    def write_while_it_is_deleted(path: Path) -> int:
        store.delete(session)
        return writer()(path)

    assert not states.keep(session.number, "f", IDS, write_while_it_is_deleted)
    assert files(tmp_path) == []


def test_room_is_judged_by_what_earlier_states_took(
    store: SessionStore, states: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a disk filled by a state that is known to be large."""
    session, other = stored(store), stored(store)
    states.keep(session.number, "f", IDS, writer(b"x" * 6400))
    free = type("Usage", (), {"free": module.SPARE_BYTES + 6399})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    assert not states.keep(other.number, "f", IDS, writer())
    assert states.keep(other.number, "f", IDS[:-1], writer(n_tokens=63))


def test_the_cap_holds_and_the_oldest_goes_first(
    store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a disk that fills up with caches; the one just written thrown away."""
    clock = iter(range(1, 1000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    states = StateStore(tmp_path, cap_bytes=30)
    sessions = [stored(store) for _ in range(4)]
    for session in sessions[:3]:
        states.keep(session.number, "f", IDS, writer(b"x" * 10))
    assert states.find(sessions[0].number, "f", IDS) is not None  # used again: the second is the oldest now
    states.keep(sessions[3].number, "f", IDS, writer(b"x" * 10))
    kept = [states.find(session.number, "f", IDS) is not None for session in sessions]
    assert kept == [True, False, True, True]
    StateStore(tmp_path, cap_bytes=15).tidy()
    assert len(files(tmp_path)) == 1
    assert states.find(sessions[3].number, "f", IDS) is not None


def test_deleting_a_session_takes_its_states(store: SessionStore, states: StateStore, tmp_path: Path) -> None:
    """Guards: gigabytes, and what was said, left of a deleted conversation."""
    session, other = stored(store), stored(store)
    states.keep(session.number, "f", IDS, writer())
    states.keep(session.number, "g", IDS, writer())
    states.keep(other.number, "f", IDS, writer())
    store.delete(session)
    assert len(files(tmp_path)) == 1
    assert states.find(other.number, "f", IDS) is not None


def test_tidying_takes_orphans_but_not_what_is_being_written(
    store: SessionStore, states: StateStore, tmp_path: Path
) -> None:
    """Guards: leftovers of crashes for ever; a state of another chat removed under its hands."""
    session = stored(store)
    states.keep(session.number, "f", IDS, writer())
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
    assert states.find(session.number, "f", IDS) is None


def test_a_state_is_not_an_orphan_before_it_is_recorded(
    store: SessionStore, states: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: tidying in the moment between a state's rename and its row."""
    session = stored(store)
    monkeypatch.setattr(module, "reach", lambda point: StateStore(tmp_path).tidy())
    assert states.keep(session.number, "f", IDS, writer())
    assert states.find(session.number, "f", IDS) is not None
    with locked(tmp_path / "states" / f"{'e' * 16}.state"):
        states.tidy()


def test_a_long_state_does_not_hide_a_better_one(store: SessionStore, states: StateStore) -> None:
    """Guards: a fork's own state passed over since the original's has more tokens, of which few are
    wanted.
    """
    session = stored(store)
    fork = store.fork(session)
    long, short = tuple(range(4000)), (*range(300), 9, 9)
    states.keep(fork.number, "f", short[:300], writer(b"fork", 300))
    states.keep(session.number, "f", long, writer(b"original", 4000))
    path = states.find(fork.number, "f", short)
    assert path is not None
    assert path.read_bytes() == b"fork"


def test_a_state_that_is_there_already_is_used_anew(
    store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: the state of the chat that is open taken for the oldest."""
    clock = iter(range(1, 1000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    states = StateStore(tmp_path, cap_bytes=25)
    first, second, third = (stored(store) for _ in range(3))
    for session in (first, second, first, third):
        assert states.keep(session.number, "f", IDS, writer(b"x" * 10))
    kept = [states.find(session.number, "f", IDS) is not None for session in (first, second, third)]
    assert kept == [True, False, True]
