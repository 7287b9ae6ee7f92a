"""The output and its journal: incomplete ends are cut, other changes and other settings are refused."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import OUTPUT_SETTINGS as SETTINGS
from support.batches import content_of, found_in, open_output, record, write_groups

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, NoSpaceError
from dsmoe_local.batch.journal import journal_path
from dsmoe_local.batch.output import Output

GROUPS = [[1, 2], [3], [4, 5, 6]]


def write(out: Path) -> None:
    write_groups(out, GROUPS)


def content(*numbers: int) -> bytes:
    return content_of(numbers)


def test_records_are_found_again(out: Path) -> None:
    """Guards: keys that are not read back; records of earlier runs that are lost."""
    write(out)
    assert out.read_bytes() == content(1, 2, 3, 4, 5, 6)
    assert found_in(out) == [1, 2, 3, 4, 5, 6]
    with open_output(out) as output:
        output.append([record(7)])
    assert found_in(out) == [1, 2, 3, 4, 5, 6, 7]
    assert found_in(out, restart=True) == []
    assert out.read_bytes() == b""


def without_last_mark(out: Path) -> None:
    """Leave what a kill leaves before the last group's commit mark."""
    lines = journal_path(out).read_bytes().splitlines(keepends=True)
    assert is_commit(lines.pop())
    journal_path(out).write_bytes(b"".join(lines))


@settings(max_examples=40)
@given(data=st.data())
def test_any_end_of_a_group_without_a_mark_may_be_missing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Guards: an incomplete record, or its entry, taken for whole; whole records thrown away."""
    out = tmp_path_factory.mktemp("torn") / "out.jsonl"
    write(out)
    without_last_mark(out)
    journal = journal_path(out)
    whole = out.read_bytes()
    lost = data.draw(st.integers(0, len(content(4, 5, 6))))
    os.truncate(out, len(whole) - lost)
    if data.draw(st.booleans()):
        # A file system leaves zeros for a page that was not written.
        with out.open("ab") as file:
            file.write(bytes(data.draw(st.integers(0, lost))))
    n_whole = sum(len(content(*range(1, n + 1))) <= len(whole) - lost for n in range(1, 7))
    if lost == len(content(4, 5, 6)) and out.stat().st_size == len(content(1, 2, 3)):
        n_torn = data.draw(st.integers(0, 20))
        os.truncate(journal, journal.stat().st_size - n_torn)
        with journal.open("ab") as file:
            file.write(bytes(data.draw(st.integers(0, n_torn))))
    assert len(found_in(out)) == n_whole
    assert out.read_bytes() == whole[: len(content(*range(1, n_whole + 1)))]
    with open_output(out) as output:
        output.append([record(9)])
    assert found_in(out)[-1] == 9


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_damaged_record_that_was_acknowledged_is_refused(out: Path, number: int) -> None:
    """Guards: a damaged record that is not the first of its group, or is in the last group, taken for the
    torn end of a run, so that it and all after it are cut off silently.
    """
    with open_output(out) as output:
        output.append([record(1), record(2), record(3)])
        output.append([record(4), record(5)])
    out.write_bytes(out.read_bytes().replace(b'"id": %d' % number, b'"id": 7'))
    before = out.read_bytes()
    with pytest.raises(FileError, match="does not match its journal"):
        found_in(out)
    assert out.read_bytes() == before


class Disk:
    """Records writes, syncs and cuts as words. The step `failing` raises the OSError number `error`."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self.failing = ""
        self.error = errno.EIO
        self._out = out
        for owner, name, word in (
            (durable, "sync", "sync"),
            (os, "write", "write"),
            (os, "ftruncate", "cut"),
        ):
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name), word))

    def _watched(self, real: Callable[..., Any], word: str) -> Callable[..., Any]:
        def call(descriptor: int, *arguments: Any) -> Any:
            file = "output" if os.path.samestat(os.fstat(descriptor), self._out.stat()) else "journal"
            step = "mark" if word == "write" and is_commit(*arguments) else f"{word} {file}"
            self.steps.append(step)
            if step == self.failing:
                raise OSError(self.error, os.strerror(self.error))
            return real(descriptor, *arguments)

        return call


def is_commit(line: bytes) -> bool:
    return line.endswith(b'"committed"\n')


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_commit_mark_follows_its_records(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a mark that is on the disk before its records are; more syncs than two for a group."""
    with open_output(out) as output:
        disk = Disk(out, monkeypatch)
        output.append([record(1)])
        output.append([record(2)])
    group = ["write journal", "sync journal", "write output", "sync output", "mark"]
    # The last mark is synced when the files are closed.
    assert disk.steps == [*group, *group, "sync journal"]


def test_what_a_killed_run_left_is_synced_before_it_counts(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: records that are only in the page cache, counted by the next run; a power failure
    after which the output has an end again that the journal does not explain.
    """
    write(out)
    without_last_mark(out)
    disk = Disk(out, monkeypatch)
    open_output(out).close()
    assert disk.steps == ["sync output", "mark", "sync journal"]
    disk.steps.clear()
    without_last_mark(out)
    os.truncate(out, out.stat().st_size - 1)
    open_output(out).close()
    assert disk.steps == ["cut output", "sync output", "cut journal", "mark", "sync journal"]


@pytest.mark.parametrize("failing", ["write journal", "sync journal", "write output", "sync output", "mark"])
@pytest.mark.parametrize(("error", "kind"), [(errno.EIO, FileError), (errno.ENOSPC, NoSpaceError)])
def test_a_failing_disk_leaves_whole_records(
    out: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: int, kind: type[FileError]
) -> None:
    """Guards: half a record at the end of the file; records that are only in the page cache, because their
    sync failed, counted by the next run; a sync that is retried, which succeeds without the data.
    """
    with open_output(out) as output:
        output.append([record(1)])
        disk = Disk(out, monkeypatch)
        disk.failing, disk.error = failing, error
        with pytest.raises(FileError, match=os.strerror(error)) as refusal:
            output.append([record(2), record(3)])
        assert type(refusal.value) is kind
        assert disk.steps.count(failing) == 1
        assert out.read_bytes() == content(1)
    assert failing not in disk.steps[disk.steps.index(failing) + 1 :]
    disk.failing = ""
    assert found_in(out) == [1]


def test_a_short_write_is_continued(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: half a record, because os.write wrote only part of it."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    write(out)
    assert found_in(out) == [1, 2, 3, 4, 5, 6]


def test_a_journal_of_another_version_is_refused_in_words(out: Path) -> None:
    """Guards: a journal with another format that is misread, or called damaged."""
    out.write_bytes(content(1))
    journal_path(out).write_bytes(lines_of(b'{"dsmoe_batch":4}'))
    with pytest.raises(FileError, match="another version") as refusal:
        found_in(out)
    assert "--restart" in str(refusal.value)
    assert found_in(out, restart=True) == []


def lines_of(*texts: bytes) -> bytes:
    """Return journal lines with valid checksums."""
    checksums = accumulate(texts, lambda checksum, text: zlib.crc32(text, checksum), initial=0)
    return b"".join(b"%08x %b\n" % pair for pair in zip(list(checksums)[1:], texts, strict=True))


HEADER = b'{"dsmoe_batch":3,"settings":{"model":"7 bytes abc","temperature":"0.8"},"loaded":{},"names":{}}'
ENTRY = b'["00000000000000010000000000000001",1,0,""]'


@pytest.mark.parametrize(
    "texts",
    [
        (b"",),
        (b"not JSON",),
        (b"[1]",),
        (b"null",),
        (b"{}",),
        (b'{"x":1}',),
        (HEADER.replace(b',"names":{}', b""),),
        (HEADER.replace(b'"names"', b'"nicknames"'),),
        (HEADER.replace(b'"names":{}', b'"names":{},"has_lines":true'),),
        (HEADER.replace(b'"names":{}', b'"names":[]'),),
        (HEADER, b"[1]"),
        (HEADER, ENTRY.replace(b",1,", b',"1",')),
        (HEADER, ENTRY.replace(b",1,", b",-1,")),
        (HEADER, ENTRY.replace(b'["0', b'["x')),
    ],
)
def test_lines_with_other_values_are_damage(out: Path, texts: tuple[bytes, ...]) -> None:
    """Guards: a traceback for a journal line whose checksum is right and whose value is not."""
    out.write_bytes(content(1))
    journal_path(out).write_bytes(lines_of(*texts))
    with pytest.raises(FileError, match="the journal is damaged"):
        found_in(out)
    assert out.read_bytes() == content(1)


def edit_journal(out: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    lines = journal_path(out).read_bytes().splitlines(keepends=True)
    changed = change(list(lines))
    assert changed != lines
    journal_path(out).write_bytes(b"".join(changed))


def hide_the_last_record(out: Path) -> None:
    """Damage both files, so that the output has all records of which the journal has a valid entry."""
    os.truncate(out, len(content(1, 2, 3, 4, 5)))
    edit_journal(out, lambda lines: [*lines[:-2], lines[-2].replace(b'["0', b'["1'), lines[-1]])


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out.write_bytes(out.read_bytes() + b"{}\n"),
        lambda out: out.write_bytes(out.read_bytes().replace(b"1", b"8")),
        lambda out: os.truncate(out, len(content(1))),
        lambda out: out.unlink(),
        lambda out: edit_journal(out, lambda lines: [lines[0].replace(b"7 bytes", b"8 bytes"), *lines[1:]]),
        lambda out: edit_journal(out, lambda lines: [lines[0].replace(b'"loaded"', b'"loader"'), *lines[1:]]),
        lambda out: edit_journal(out, lambda lines: [b"\n", *lines]),
        lambda out: edit_journal(out, lambda lines: [lines[0], *lines[2:]]),
        lambda out: edit_journal(out, lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]]),
        lambda out: edit_journal(out, lambda lines: [*lines[:3], *lines[2:]]),
        lambda out: edit_journal(out, lambda lines: [*lines[:4], *lines[5:]]),
        lambda out: edit_journal(out, lambda lines: lines[:-2]),
        lambda out: edit_journal(out, lambda lines: [*lines[:2], lines[2].replace(b'["0', b'["1')]),
        lambda out: journal_path(out).unlink(),
        hide_the_last_record,
    ],
)
def test_foreign_changes_are_refused(out: Path, change: Callable[[Path], object]) -> None:
    """Guards: records cut off, or answered again, because somebody edited the files."""
    write(out)
    change(out)
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    with pytest.raises(FileError, match="--restart"):
        found_in(out)
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    assert found_in(out, restart=True) == []


def test_a_foreign_output_is_kept(out: Path) -> None:
    """Guards: another tool's file deleted, because a run that ended before its first record left a
    journal of that name; one deleted that was written while the model was loaded.
    """
    open_output(out).close()
    assert found_in(out) == []
    out.write_bytes(b"precious\n")
    with pytest.raises(FileError, match="has no record") as refusal:
        found_in(out)
    assert "--restart" in str(refusal.value)
    assert out.read_bytes() == b"precious\n"
    out.unlink()
    output = Output(out, SETTINGS, lambda key, failure: None)
    out.write_bytes(b"precious\n")
    with pytest.raises(FileError, match="has no record"):
        output.open()
    assert out.read_bytes() == b"precious\n"
    assert found_in(out, restart=True) == []


def test_other_settings_are_shown(out: Path) -> None:
    """Guards: records of two models in one file; a refusal that does not say what differs, or shows
    digests.
    """
    with Output(out, SETTINGS, lambda key, failure: None, names={"model": "a.gguf"}) as begun:
        begun.open()
        begun.append([record(number) for number in (1, 2, 3, 4, 5, 6)])
    other = {"model": "8 bytes def", "temperature": "0.8", "top_k": "1"}
    for name, told in (("b.gguf", "model: a.gguf then, b.gguf now"), ("a.gguf", "model: a.gguf has changed")):
        with pytest.raises(FileError) as refusal:
            Output(out, other, lambda key, failure: None, names={"model": name})
        assert f"another model ({told}; top_k: not set then, 1 now)" in str(refusal.value)
    # A setting that the journal does not have, and that is not used.
    assert found_in(out, settings=SETTINGS | {"keep": "None"}) == [1, 2, 3, 4, 5, 6]
    assert found_in(out, settings=other, restart=True) == []
    # There is no record with these settings: they may change.
    assert found_in(out) == []
    assert json.loads(journal_path(out).read_bytes().splitlines()[0][9:])["settings"] == SETTINGS


def test_what_only_loading_tells_is_held(out: Path) -> None:
    """Guards: records of two kernels in a file that promises equal texts; a run refused for no reason."""
    here, there = {"kernels": "repacked"}, {"kernels": "as in the file"}

    def resumed(loaded: dict[str, str], *, restart: bool = False) -> None:
        with Output(out, SETTINGS, lambda key, failure: None, restart=restart) as output:
            output.require(loaded)
            output.open()
            output.append([record(1)])

    resumed(here)
    resumed(here)
    with pytest.raises(FileError, match="kernels: repacked then, as in the file now"):
        resumed(there)
    assert found_in(out) == [1, 1]
    resumed(there, restart=True)
    with pytest.raises(FileError, match="kernels"):
        resumed(here)


def test_nothing_is_touched_before_it_is_opened(out: Path) -> None:
    """Guards: an output that is lost or cut, although the model could not be loaded."""
    with Output(out, SETTINGS, lambda key, failure: None):
        assert list(out.parent.iterdir()) == []
    write(out)
    without_last_mark(out)
    os.truncate(out, out.stat().st_size - 3)
    before = out.read_bytes()
    for restart in (False, True):
        Output(out, SETTINGS, lambda key, failure: None, restart=restart).close()
        assert out.read_bytes() == before
