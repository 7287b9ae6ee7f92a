"""The files of a reference: complete or not there, never written over, refused if damaged or forged."""

from __future__ import annotations

import errno
import math
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.block_files import resealed

from dsmoe_local.base.errors import FileError, FormatError, LockedError
from dsmoe_local.evaluate import reference_blocks
from dsmoe_local.evaluate.reference_files import Prediction, PredictionReader, PredictionWriter


def make_writer(path: Path) -> PredictionWriter:
    return PredictionWriter(path, 640)


def add_one(writer: PredictionWriter, request_id: str) -> None:
    ids, logprobs = np.array([3, 5], np.int32), np.array([-0.1, -4.0], np.float32)
    writer.add(request_id, 1, [Prediction(3, -0.1, 0.1, ids, logprobs)])


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_reference_has_its_name_once_it_is_complete(tmp_path: Path) -> None:
    """Guards: half a reference that passes for a whole one; files that runs without tokens leave behind; a
    request id that is lost.
    """
    path = tmp_path / "ref"
    writer = make_writer(path)
    writer.finish()
    names = ("first", "sec\ud800nd", "ünï/3")
    for name in names:
        add_one(writer, name)
    assert not path.exists()
    with pytest.raises(LockedError):
        make_writer(path)
    writer.finish()
    writer.finish()
    reader = PredictionReader(path)
    assert reader.n_tokens == len(names)
    assert all(reader.find(name, 1) is not None for name in names)
    assert (reader.find("first", 0), reader.find("first", 2), reader.find("other", 1)) == (None, None, None)
    reader.close()
    with pytest.raises(FileError, match="nothing can be added"):
        add_one(writer, "more")
    for _ in range(2):
        writer.close()
    make_writer(tmp_path / "empty").close()
    with pytest.raises(FileError, match="exists already"):
        make_writer(path)
    assert [file.name for file in tmp_path.iterdir()] == ["ref"]


def test_closing_completes_the_file_and_a_killed_runs_part_is_overwritten(tmp_path: Path) -> None:
    """Guards: tokens lost because nobody asked for a summary; a dead process that blocks the next one."""
    path = tmp_path / "ref"
    (tmp_path / ".ref.part").write_bytes(b"longer than a header" * 100)
    writer = make_writer(path)
    add_one(writer, "first")
    writer.close()
    assert PredictionReader(path).n_tokens == 1


def test_no_link_is_followed(tmp_path: Path) -> None:
    """Guards: a user's file truncated through a link with the name of the partial file."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".ref.part").symlink_to(victim)
    writer = make_writer(tmp_path / "ref")
    add_one(writer, "first")
    writer.close()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "ref").is_symlink()
    assert stat.S_IMODE((tmp_path / "ref").stat().st_mode) == 0o600


def test_what_cannot_be_read_back_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a reference under its final name that a bad disk has cut."""
    path, part = tmp_path / "ref", tmp_path / ".ref.part"
    writer = make_writer(path)
    add_one(writer, "first")
    monkeypatch.setattr(reference_blocks, "sync", lambda _: part.write_bytes(part.read_bytes()[:-1]))
    for finish in (writer.finish, writer.close):
        with pytest.raises(FormatError, match="was not finished"):
            finish()
    assert not path.exists()


@pytest.mark.parametrize("when", ["write", "sync"])
def test_a_full_disk(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a traceback for a full disk; half a block with others behind it; a part that keeps the disk
    full.
    """
    writer = make_writer(tmp_path / "ref")
    add_one(writer, "first")
    if when == "sync":
        monkeypatch.setattr(reference_blocks, "sync", full_disk)
        with pytest.raises(FileError, match="No space left"):
            writer.finish()
    else:
        monkeypatch.setattr(writer, "_file", FullFile(writer._file))
        with pytest.raises(FileError, match="No space left"):
            add_one(writer, "second")
    monkeypatch.undo()
    with pytest.raises(FileError, match="incomplete"):
        add_one(writer, "more")
    for finish in (writer.finish, writer.close):
        with pytest.raises(FileError, match="incomplete"):
            finish()
    writer.close()
    assert list(tmp_path.iterdir()) == []


class FullFile:
    """A file on a full disk, which also shows when it is closed."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        full_disk()

    def close(self) -> None:
        self._file.close()
        full_disk()


def test_a_file_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    """Guards: somebody else's work replaced when ours is done, or ours lost."""
    path = tmp_path / "ref"
    writer = make_writer(path)
    add_one(writer, "first")
    path.write_text("theirs")
    for finish in (writer.finish, writer.close):
        with pytest.raises(FileError, match=r"\.ref\.part"):
            finish()
    writer.close()
    assert path.read_text() == "theirs"
    assert PredictionReader(tmp_path / ".ref.part").n_tokens == 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "whole"
    writer = make_writer(path)
    for name in ("first", "second"):
        add_one(writer, name)
    writer.close()
    return path


def forged(content: bytes, kind: str) -> bytes:
    """Return a wrong file with correct checksums."""
    changed = bytearray(content)
    start = 12 + int.from_bytes(content[8:12], "little") + 8
    count = int.from_bytes(changed[start : start + 4], "little")
    told = start + 12 + int.from_bytes(content[start + 8 : start + 12], "little")
    place = {"size": 12 * count, "id": 16 * count, "negative": 16 * count, "nan": 4 * count}.get(kind, 0)
    value = {
        "size": struct.pack("<i", 10**6),
        "id": struct.pack("<i", 640),
        "negative": struct.pack("<i", -1),
        "nan": struct.pack("<f", math.nan),
    }.get(kind, b"")
    changed[told + place : told + place + len(value)] = value
    if kind == "name":
        changed[start + 8 : start + 12] = struct.pack("<I", 10**9)
    if kind == "number":
        changed[12 : 12 + 40] = changed[12 : 12 + 40].replace(b"640", b"1.5")
    if kind == "deep":
        changed[12:start] = b"[" * (start - 20) + changed[start - 8 : start]
    return resealed(bytes(changed))


@pytest.mark.parametrize("kind", ["size", "id", "negative", "nan", "name", "number", "deep"])
def test_forged_references_are_refused(kind: str, written: Path) -> None:
    """Guards: a reference from elsewhere that ends in a traceback; numpy takes negative ids."""
    path = written.with_name("forged")
    path.write_bytes(forged(written.read_bytes(), kind))
    with pytest.raises(FormatError):
        PredictionReader(path).find("first", 1)


@settings(max_examples=150)
@given(st.data())
def test_damaged_references_are_refused(written: Path, data: st.DataObject) -> None:
    """Guards: a torn or altered file that is compared with, or that fails inside numpy; one cut between two
    blocks that passes for a shorter one.
    """
    whole = written.read_bytes()
    where = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(("cut", "flip")))
    path = written.with_name("damaged")
    path.write_bytes(
        whole[:where] if kind == "cut" else whole[:where] + bytes([whole[where] ^ 0x41]) + whole[where + 1 :]
    )
    with pytest.raises((FileError, FormatError)):
        PredictionReader(path)
