"""Chats killed with -9 while they save: every acknowledged turn is there, and the database is sound."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.kills import points_of

from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.store.states import StateStore

WORK = """
import sys
from pathlib import Path
from support.stored import talk
from dsmoe_local.chat.store.sessions import SessionStore
from dsmoe_local.chat.store.states import BLOCK, StateStore
folder, name = Path(sys.argv[1]), sys.argv[2]
n_turns, n_saves = int(sys.argv[3]), int(sys.argv[4])
store, states = SessionStore.open(folder), StateStore(folder)
if name in store.names():
    session = store.find(name)
    texts = [turn.content for turn in session.load("v").turns]
    if texts[-1].endswith(" "):
        texts.pop()
else:
    session, texts = store.create("m", "v", ""), []
    store.rename(session, name)

def write(path, start, end):
    path.write_bytes(b"state of " + " ".join(texts).encode() * 50)
    return end

for number in range(n_saves):
    for _ in range(n_turns):
        texts.append(f"turn {len(texts)} of {name}")
    for spaces in (" ", "  "):
        assert session.save(talk(*texts[:-1], texts[-1] + spaces), partial=True) is None
    assert session.save(talk(*texts)) is None
    print(len(texts), flush=True)
    states.keep(session.number, "fingerprint", range(len(texts), len(texts) + 2 * BLOCK), write)
    states.tidy()
"""


@dataclass(frozen=True)
class Chatting:
    """A chat of one name that saves, and after each save prints how many turns are acknowledged."""

    folder: Path
    name: str = "one"
    n_turns: int = 2
    n_saves: int = 30

    def spawn(self, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """The running child."""
        arguments = [str(self.folder), self.name, str(self.n_turns), str(self.n_saves)]
        return subprocess.Popen(
            [sys.executable, "-c", WORK, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
        )

    def end(self, child: subprocess.Popen[str], acknowledged: int, *, alone: bool = True) -> int:
        """Wait for it, and check the store; returns how many turns are acknowledged."""
        assert child.stdout is not None
        assert child.stderr is not None
        with child:
            # Not communicate: it would miss what readline has read ahead.
            output, errors = child.stdout.read(), child.stderr.read()
        assert errors == ""
        lines = output.split("\n")[:-1]  # what is behind the last newline was cut off
        acknowledged = int(lines[-1]) if lines else acknowledged
        check_sound(self.folder, alone=alone)
        store = SessionStore.open(self.folder)
        try:
            n_turns = self.n_whole(store)
            # What was being written may be there, too; as a whole.
            assert n_turns in (acknowledged, acknowledged + self.n_turns - 1, acknowledged + self.n_turns)
            assert len(store.search(f"turn of {self.name}", 10_000)) == n_turns
        finally:
            store.close()
        return n_turns

    def n_whole(self, store: SessionStore) -> int:
        """How many turns are stored of it, beside a reply that was growing."""
        if self.name not in store.names():
            return 0
        turns = store.find(self.name).load("v").turns
        whole = [turn for turn in turns if turn.content[-1].isalpha()]
        *_, last = turns
        assert turns[: len(whole)] == tuple(whole)
        assert [turn.content for turn in whole] == [f"turn {n} of {self.name}" for n in range(len(whole))]
        assert len(turns) - len(whole) == (last.content[-1] == " ")
        return len(whole)


def check_sound(folder: Path, *, alone: bool) -> None:
    """No page of the database is damaged, and once tidied the states are those that it knows."""
    if not (folder / "sessions.db").exists():
        return
    StateStore(folder).tidy()
    connection = sqlite3.connect(folder / "sessions.db")
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        known = {file for (file,) in connection.execute("SELECT file FROM state")}
    finally:
        connection.close()
    states = folder / "states"
    there = {path.name for path in states.iterdir()} if states.exists() else set()
    assert there == known or not alone


@pytest.mark.parametrize("point", [*points_of("session"), *points_of("state")])
def test_killed_at_every_point(tmp_path: Path, point: str) -> None:
    """Guards: a step of a save that loses a turn, or stores half of one, when it is cut short there."""
    chatting = Chatting(tmp_path / "sessions", n_saves=3)
    acknowledged = 0
    for ordinal in (1, 2, 3):
        child = chatting.spawn({"DSMOE_FAULT": f"{point}:{ordinal}"})
        acknowledged = chatting.end(child, acknowledged)
        assert child.returncode == -signal.SIGKILL, f"{point}:{ordinal} is never reached"
    child = chatting.spawn()
    assert chatting.end(child, acknowledged) == acknowledged + 6
    assert child.returncode == 0


def test_killed_at_random(tmp_path: Path) -> None:
    """Guards: a crash between two named points, while another chat writes to the same file."""
    kill_at_random(tmp_path, n_kills=12, seed=3)


@pytest.mark.soak
def test_store_soak(tmp_path: Path) -> None:
    """Guards: what a dozen kills do not meet."""
    kill_at_random(tmp_path, n_kills=200, seed=int(time.time()))


def kill_at_random(folder: Path, n_kills: int, seed: int) -> None:
    """Kill one of two chats at a time, again and again."""
    generator = random.Random(seed)
    chats = [Chatting(folder / "sessions", name, n_saves=10_000) for name in ("one", "two")]
    acknowledged = [0, 0]
    children = [chat.spawn() for chat in chats]
    for _ in range(n_kills):
        victim = generator.randrange(2)
        child = children[victim]
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line, child.communicate()[1]
        acknowledged[victim] = int(line)
        try:
            child.wait(timeout=generator.uniform(0, 0.1))
        except subprocess.TimeoutExpired:
            child.kill()
        # The other one goes on writing while this one is looked at.
        acknowledged[victim] = chats[victim].end(child, acknowledged[victim], alone=False)
        assert child.returncode == -signal.SIGKILL, seed
        children[victim] = chats[victim].spawn()
    for victim, child in enumerate(children):
        child.kill()
        chats[victim].end(child, acknowledged[victim], alone=victim == 1)
