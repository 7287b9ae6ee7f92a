"""Random damage to outputs, journals and copies of standard input: refused, or without effect."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.batches import answer, batch, by_id, content_of, found_in, write_groups
from support.fake_engine import FakeEngine
from support.mutations import Outcome, damaged_bytes, try_mutants

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError
from dsmoe_local.batch.input_form import InputForm
from dsmoe_local.batch.journal import journal_path
from dsmoe_local.batch.spool import spool_path, spooled

GROUPS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11, 12]]


@pytest.fixture(autouse=True)
def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of runs, and no power failure."""
    monkeypatch.setattr(durable, "sync", lambda descriptor: None)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return `content` with changes: also zeros, and blocks that are swapped."""
    changed = content
    while changed == content:
        kind = rng.randrange(4)
        if kind == 0:
            begin, end = sorted(rng.choices(range(len(content) + 1), k=2))
            changed = content[:begin] + bytes(end - begin) + content[end:]
        elif kind == 1:
            a, b, c, d = sorted(rng.choices(range(len(content) + 1), k=4))
            changed = content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]
        else:
            changed = damaged_bytes(content, rng)
    return changed


class _Files:
    """An output and its journal, to be damaged. `torn`: the run was killed within the last group."""

    def __init__(self, folder: Path, *, torn: bool) -> None:
        self.out = folder / "out.jsonl"
        write_groups(self.out, GROUPS)
        self.committed = [number for group in GROUPS for number in group]
        self.output = self.out.read_bytes()
        self.journal = journal_path(self.out).read_bytes()
        self.kept = self.output
        if torn:
            marks = self.journal.splitlines(keepends=True)
            self.journal = b"".join(marks[:-1])
            self.committed = self.committed[: -len(GROUPS[-1])]
            self.kept = content_of(self.committed)
            self.output = self.output[:-5]

    def read(self, rng: random.Random) -> None:
        """Damage one of the files and read the records. FileError if the damage is detected."""
        output, journal = self.output, self.journal
        if rng.random() < 0.5:
            output = damaged(output, rng)
        else:
            journal = damaged(journal, rng)
        self.out.write_bytes(output)
        journal_path(self.out).write_bytes(journal)
        try:
            found = found_in(self.out, 13)
        except FileError:
            assert self.out.read_bytes() == output
            assert journal_path(self.out).read_bytes() == journal
            raise
        assert found[: len(self.committed)] == self.committed
        assert self.out.read_bytes().startswith(self.kept)
        assert found_in(self.out) == [*found, 13]


def one_damaged(folder: Path, n: int, seed: int) -> Outcome:
    return try_mutants(_Files(folder, torn=False).read, n, seed)


def one_damaged_after_a_kill(folder: Path, n: int, seed: int) -> Outcome:
    return try_mutants(_Files(folder, torn=True).read, n, seed)


def both_damaged(folder: Path, n: int, seed: int) -> Outcome:
    files = _Files(folder, torn=False)

    def read(rng: random.Random) -> None:
        output, journal = (
            damaged(content, rng) if rng.random() < 0.8 else content
            for content in (files.output, files.journal)
        )
        if files.journal.startswith(journal.rstrip(b"\0")) and output != files.output:
            # Both are cut: a kill can leave the same.
            return
        files.out.write_bytes(output)
        journal_path(files.out).write_bytes(journal)
        assert found_in(files.out) == files.committed

    return try_mutants(read, n, seed)


def damaged_runs(folder: Path, n: int, seed: int) -> Outcome:
    """Continue runs with damaged files, some of them after a kill.

    Every line has its record once, and those that were acknowledged are unchanged.
    """
    lines = [{"id": str(number), "prompt": f"p{number}"} for number in range(12)]
    answer(FakeEngine(), batch(folder, *lines[:8], "bad"))
    options = batch(folder, *lines[:8], "bad", *lines[8:])
    paths = options.out, journal_path(options.out)
    whole = [path.read_bytes() for path in paths]

    def read(rng: random.Random) -> None:
        output, journal = whole
        killed = rng.random() < 0.5
        if killed:
            # Only the last commit mark is missing.
            journal = journal[: journal.rindex(b"\n", 0, -1) + 1]
        if rng.random() < 0.5:
            output = damaged(output, rng)
        elif rng.random() < 0.8:
            journal = damaged(journal, rng)
        for path, content in zip(paths, (output, journal), strict=True):
            path.write_bytes(content)
        found = by_id(answer(FakeEngine(), options))
        assert set(found) == {*(str(number) for number in range(12)), "line-9"}
        assert killed or options.out.read_bytes().startswith(whole[0])

    return try_mutants(read, n, seed)


@pytest.mark.parametrize(
    ("check", "n"),
    [(one_damaged, 700), (one_damaged_after_a_kill, 700), (both_damaged, 1500), (damaged_runs, 150)],
)
def test_damaged_files(tmp_path: Path, check: Callable[[Path, int, int], Outcome], n: int) -> None:
    """Guards: acknowledged records that vanish, or count for another line, because a byte was changed; damage
    to one file that hides damage to the other; a line answered twice or never; a traceback.
    """
    check(tmp_path, n, 1)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("check", "n"),
    [(one_damaged, 25_000), (one_damaged_after_a_kill, 25_000), (both_damaged, 25_000), (damaged_runs, 5000)],
)
def test_damaged_files_soak(tmp_path: Path, check: Callable[[Path, int, int], Outcome], n: int) -> None:
    """Guards: damage that a few hundred files do not show."""
    print(check(tmp_path, n, 2))


def damaged_spools(folder: Path, monkeypatch: pytest.MonkeyPatch, n: int, seed: int) -> Outcome:
    """Continue runs from the copy of standard input."""
    out = folder / "out.jsonl"
    given = folder / "given"
    given.write_bytes(b"".join(b'{"prompt": "p%d"}\n' % number for number in range(20)))
    with given.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with spooled(out, threading.Event()) as spool:
            spool.keep()
    whole = spool_path(out).read_bytes()
    empty = Path(os.devnull).open()  # noqa: SIM115 - read again and again
    monkeypatch.setattr(sys, "stdin", empty)

    def read(rng: random.Random) -> None:
        spool_path(out).write_bytes(whole if rng.random() < 0.1 else damaged(whole, rng))
        with spooled(out, threading.Event()) as spool:
            source = spool.source(InputForm())
            assert b"".join(raw for _, raw in source.spans()) == given.read_bytes()
            source.close()

    try:
        return try_mutants(read, n, seed)
    finally:
        empty.close()


def test_a_damaged_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: lines that are skipped, or answered although they changed, because the copy of standard input
    was damaged.
    """
    damaged_spools(tmp_path, monkeypatch, 500, seed=6)
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.soak
def test_damaged_spools_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: damage that a few hundred inputs do not show."""
    print(damaged_spools(tmp_path, monkeypatch, 50_000, seed=7))
