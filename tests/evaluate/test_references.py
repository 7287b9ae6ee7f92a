"""Kept references: no file is replaced, no temporary file stays, and foreign files are refused."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dsmoe_local.base.errors import FileError, FormatError, LockedError
from dsmoe_local.base.paths import cache_folder
from dsmoe_local.base.scratch import scratch_folder
from dsmoe_local.evaluate.reference import Reference, keep, reserved, unpack
from dsmoe_local.evaluate.windows import Windows

ABOUT = {
    "version": 1, "model": "m", "text": "t", "text_digest": "d", "vocabulary": "v", "n_context": 16,
    "gates": None,
}  # fmt: skip


@pytest.fixture
def recorded(tmp_path: Path) -> Reference:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "about.json").write_text(json.dumps(ABOUT))
    (folder / "tokens").write_bytes(bytes(64))
    (folder / "predictions").write_bytes(b"x")
    return Reference(folder, "m", Windows((tuple([0] * 16),), "t", "d", "v"), None)


def test_what_another_run_has_kept_stays(
    recorded: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: hours of work replaced by those of a run that ended a moment later."""
    kept = tmp_path / "kept"

    def be_late(descriptor: int) -> None:
        kept.write_text("hours of another run")

    monkeypatch.setattr("dsmoe_local.evaluate.reference.sync", be_late)
    with reserved(kept), pytest.raises(FileError, match="exists already"):
        keep(recorded, kept)
    assert kept.read_text() == "hours of another run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "work"]
    with pytest.raises(FileError, match="exists already"), reserved(kept):
        raise AssertionError


def test_a_name_is_one_runs_from_the_start(tmp_path: Path) -> None:
    """Guards: two long runs that write the same file, so that one of them is lost."""
    with (
        reserved(tmp_path / "kept"),
        pytest.raises(LockedError, match="another run"),
        reserved(tmp_path / "kept"),
    ):
        raise AssertionError
    with (
        pytest.raises(FileError, match="the reference cannot be written"),
        reserved(tmp_path / "no" / "kept"),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_a_kept_reference_is_private_and_comes_back(recorded: Reference, tmp_path: Path) -> None:
    """Guards: a text that others can read; what a killed run left, in the way or followed as a link."""
    kept, victim = tmp_path / "kept", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".kept.part").symlink_to(victim)
    with reserved(kept):
        keep(recorded, kept)
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    folder = tmp_path / "again"
    folder.mkdir()
    assert unpack(kept, folder) == Reference(folder, "m", recorded.windows, None)
    assert not (tmp_path / ".kept.part").is_symlink()


@pytest.mark.parametrize("change", ["flipped", "cut"])
def test_what_the_disk_spoils_gets_no_name(
    change: str, recorded: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a reference under its final name that nobody can read when the model is gone."""
    kept, part = tmp_path / "kept", tmp_path / ".kept.part"

    def spoil(descriptor: int) -> None:
        content = part.read_bytes()
        part.write_bytes(content[:-20] if change == "cut" else content.replace(bytes(64), bytes(63) + b"x"))

    monkeypatch.setattr("dsmoe_local.evaluate.reference.sync", spoil)
    with reserved(kept), pytest.raises(FormatError, match="cannot be read back"):
        keep(recorded, kept)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_an_encrypted_archive_is_refused(recorded: Reference, tmp_path: Path) -> None:
    """Guards: zipfile's RuntimeError about a password."""
    kept = tmp_path / "kept"
    with zipfile.ZipFile(kept, "w") as archive:
        for name in ("about.json", "tokens", "predictions"):
            archive.write(recorded.folder / name, name)
    content = bytearray(kept.read_bytes())
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            content[at + offset] |= 1
    kept.write_bytes(content)
    folder = tmp_path / "again"
    folder.mkdir()
    with pytest.raises(FormatError, match="is encrypted"):
        unpack(kept, folder)


KILLED = """
from dsmoe_local.base.scratch import scratch_folder
with scratch_folder("eval") as folder:
    (folder / "predictions.part").write_bytes(b"half")
    print(folder, flush=True)
    input()
"""


def test_workplaces_of_killed_runs_go(tmp_path: Path) -> None:
    """Guards: gigabytes of killed runs for ever, in a folder that may be memory; those of a run that lives
    taken away under it.
    """
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        assert theirs.parent == cache_folder() / "eval"
        with scratch_folder("eval") as mine:
            assert stat.S_IMODE(mine.stat().st_mode) == 0o700
            assert mine.parent == theirs.parent
        assert not mine.exists()
        assert (theirs / "predictions.part").exists()
        process.kill()
    (theirs.parent / f".{'0' * 16}.lock").touch()
    (theirs.parent / "notes").touch()
    with scratch_folder("eval") as mine:
        assert sorted(path.name for path in mine.parent.iterdir()) == sorted(
            [mine.name, f".{mine.name}.lock", "notes"]
        )
    assert [path.name for path in theirs.parent.iterdir()] == ["notes"]
