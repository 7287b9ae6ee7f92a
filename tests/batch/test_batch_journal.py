"""The output and its journal: torn ends cut, foreign changes refused, other settings shown."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, NoSpaceError
from dsmoe_local.batch.journal import Output, Record, journal_path
from dsmoe_local.batch.lines import Key

SETTINGS = {"model": "7 bytes abc", "temperature": "0.8"}
GROUPS = [[1, 2], [3], [4, 5, 6]]


def record(number: int) -> Record:
    return Record(Key(number, 2**64 - number), b'{"id": %d}\n' % number, failed=number == 3)


def found_in(out: Path, settings: dict[str, str] = SETTINGS, *, restart: bool = False) -> list[int]:
    found: list[int] = []

    def visit(key: Key, failed: bool) -> None:
        assert key == record(key.id).key
        assert failed == (key.id == 3)
        found.append(key.id)

    with Output(out, settings, visit, restart=restart) as output:
        output.open()
    return found


def opened(out: Path) -> Output:
    output = Output(out, SETTINGS, lambda key, failed: None)
    output.open()
    return output


def write(out: Path) -> None:
    with opened(out) as output:
        for group in GROUPS:
            output.append([record(number) for number in group])


def content(*numbers: int) -> bytes:
    return b"".join(record(number).content for number in numbers)


def test_records_are_found_again(tmp_path: Path) -> None:
    """Guards: keys that do not survive; records of two runs that cannot be told apart."""
    out = tmp_path / "out.jsonl"
    write(out)
    assert out.read_bytes() == content(1, 2, 3, 4, 5, 6)
    assert found_in(out) == [1, 2, 3, 4, 5, 6]
    with opened(out) as output:
        output.append([record(7)])
    assert found_in(out) == [1, 2, 3, 4, 5, 6, 7]
    assert found_in(out, restart=True) == []
    assert out.read_bytes() == b""


@settings(max_examples=40)
@given(data=st.data())
def test_any_end_of_the_last_group_may_be_missing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Guards: a torn record, or its key, that is taken for whole; whole ones thrown away."""
    out = tmp_path_factory.mktemp("torn") / "out.jsonl"
    write(out)
    journal = journal_path(out)
    whole = out.read_bytes()
    lost = data.draw(st.integers(0, len(content(4, 5, 6))))
    os.truncate(out, len(whole) - lost)
    if data.draw(st.booleans()):
        # Zeros are what a file system leaves of a page that was never written.
        with out.open("ab") as file:
            file.write(bytes(data.draw(st.integers(0, lost))))
    n_whole = 3 + (len(content(4, 5, 6)) - lost) // len(content(4))
    if lost == len(content(4, 5, 6)) and out.stat().st_size == len(content(1, 2, 3)):
        os.truncate(journal, journal.stat().st_size - data.draw(st.integers(0, 20)))
    assert len(found_in(out)) == n_whole
    assert out.read_bytes() == whole[: len(content(*range(1, n_whole + 1)))]
    with opened(out) as output:
        output.append([record(9)])
    assert found_in(out)[-1] == 9


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out.write_bytes(out.read_bytes() + b"{}\n"),
        lambda out: out.write_bytes(out.read_bytes().replace(b"1", b"8")),
        lambda out: os.truncate(out, len(content(1))),
        lambda out: out.unlink(),
        lambda out: journal_path(out).write_bytes(journal_path(out).read_bytes().replace(b"[1,", b"1,[", 1)),
        lambda out: journal_path(out).write_bytes(b"\n" + journal_path(out).read_bytes()),
        lambda out: journal_path(out).unlink(),
    ],
)
def test_foreign_changes_are_refused(tmp_path: Path, change: Callable[[Path], object]) -> None:
    """Guards: records cut away, or answered again, because somebody edited the files."""
    out = tmp_path / "out.jsonl"
    write(out)
    change(out)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileError, match="--restart"):
        found_in(out)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert found_in(out, restart=True) == []


def test_a_foreign_output_is_kept(tmp_path: Path) -> None:
    """Guards: another tool's file deleted, because a run that ended before its first record left a
    journal of that name; one deleted that was written while the model was loaded.
    """
    out = tmp_path / "out.jsonl"
    opened(out).close()
    assert found_in(out) == []
    out.write_bytes(b"precious\n")
    with pytest.raises(FileError, match="knows no record") as refusal:
        found_in(out)
    assert "--restart" in str(refusal.value)
    assert out.read_bytes() == b"precious\n"
    out.unlink()
    output = Output(out, SETTINGS, lambda key, failed: None)
    out.write_bytes(b"precious\n")
    with pytest.raises(FileError, match="knows no record"):
        output.open()
    assert out.read_bytes() == b"precious\n"
    assert found_in(out, restart=True) == []


def test_other_settings_are_shown(tmp_path: Path) -> None:
    """Guards: records of two models in one file; a refusal that does not say what differs."""
    out = tmp_path / "out.jsonl"
    write(out)
    other = {"model": "8 bytes def", "temperature": "0.8", "top_k": "1"}
    with pytest.raises(FileError) as refusal:
        found_in(out, other)
    assert "model: 7 bytes abc then, 8 bytes def now; top_k: not set then, 1 now" in str(refusal.value)
    assert "temperature" not in str(refusal.value)
    assert found_in(out) == [1, 2, 3, 4, 5, 6]
    assert found_in(out, other, restart=True) == []
    # Nothing was answered with these: they may change.
    assert found_in(out) == []
    assert json.loads(journal_path(out).read_bytes())["settings"] == SETTINGS


def test_what_only_loading_tells_is_held(tmp_path: Path) -> None:
    """Guards: records of two kernels in a file that promises equal texts; a run refused for no reason."""
    out = tmp_path / "out.jsonl"
    here, there = {"kernels": "repacked"}, {"kernels": "as in the file"}

    def resumed(loaded: dict[str, str], *, restart: bool = False) -> None:
        with Output(out, SETTINGS, lambda key, failed: None, restart=restart) as output:
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


def test_nothing_is_touched_before_it_is_opened(tmp_path: Path) -> None:
    """Guards: an output lost, or half begun, because the model could not be loaded."""
    out = tmp_path / "out.jsonl"
    with Output(out, SETTINGS, lambda key, failed: None):
        assert list(tmp_path.iterdir()) == []
    write(out)
    os.truncate(out, out.stat().st_size - 3)
    before = out.read_bytes()
    for restart in (False, True):
        Output(out, SETTINGS, lambda key, failed: None, restart=restart).close()
        assert out.read_bytes() == before


def test_full_disk_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: half a record at the end of the file; an error of the disk that is tried again."""
    out = tmp_path / "out.jsonl"
    real = os.write
    with opened(out) as output:
        output.append([record(1)])

        def full(descriptor: int, data: bytes) -> int:
            if data.startswith(b"{") and len(data) > 5:
                return real(descriptor, data[:5])
            if data.startswith(b"{") or not data.startswith(b"["):
                raise OSError(errno.ENOSPC, "no space")
            return real(descriptor, data)

        monkeypatch.setattr("dsmoe_local.batch.journal.os.write", full)
        with pytest.raises(NoSpaceError, match="no space"):
            output.append([record(2)])
        monkeypatch.undo()
        assert out.read_bytes() == content(1)
        n_syncs = []

        def failing(descriptor: int) -> None:
            n_syncs.append(descriptor)
            raise OSError(errno.EIO, "bad disk")

        monkeypatch.setattr(durable, "sync", failing)
        with pytest.raises(FileError, match="bad disk"):
            output.append([record(2)])
        assert len(set(n_syncs)) == len(n_syncs)
    monkeypatch.undo()
    assert found_in(out) == [1]
