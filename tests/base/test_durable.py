"""Durable files: what is on disk after a crash, and who may write."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsmoe_local.base import durable
from dsmoe_local.base.errors import FileError, LockedError, NoSpaceError


def test_same_file_sees_through_links(tmp_path: Path) -> None:
    """Guards against emptying the input through a second name for it."""
    file = tmp_path / "a"
    file.write_bytes(b"x")
    (tmp_path / "soft").symlink_to(file)
    os.link(file, tmp_path / "hard")
    (tmp_path / "copy").write_bytes(b"x")
    assert durable.same_file(file, tmp_path / "soft")
    assert durable.same_file(file, tmp_path / "hard")
    assert not durable.same_file(file, tmp_path / "copy")
    assert not durable.same_file(file, tmp_path / "absent")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space, then run the same command to continue"),
        (errno.EDQUOT, "free some space, then run the same command to continue"),
        (errno.EROFS, "name an output in a folder that you may write to"),
        (errno.EACCES, "name an output in a folder that you may write to"),
        (errno.EIO, ""),
    ],
)
def test_what_to_do_if_an_output_cannot_be_written(number: int, remedy: str) -> None:
    """Guards: an error of the system without advice."""
    with pytest.raises(FileError) as refusal, durable.output_errors(Path("out.gguf")):
        raise OSError(number, "the reason")
    assert (refusal.value.what, refusal.value.where) == (
        "the output cannot be written: the reason",
        "out.gguf",
    )
    assert refusal.value.remedy == remedy


def test_an_error_of_the_lock_names_the_output(tmp_path: Path) -> None:
    """Guards: the name of the lock file, which users do not know, in a message."""
    output = tmp_path / "missing" / "out"
    with pytest.raises(FileNotFoundError) as caught, durable.locked(output):
        pass
    assert caught.value.filename == str(output)


def test_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a full disk costing the file that was there."""
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "sync", fail)
    with pytest.raises(OSError, match="space"):
        durable.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_the_content_is_synced_before_the_name_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: after a power cut, an empty file under the final name, or the old file in place of the new."""
    calls: list[str] = []

    def noting(word: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            calls.append(word)
            return work(*arguments)

        return run

    monkeypatch.setattr(durable, "sync", noting("content", durable.sync))
    monkeypatch.setattr(durable, "sync_folder", noting("folder", durable.sync_folder))
    monkeypatch.setattr(Path, "replace", noting("name", Path.replace))
    monkeypatch.setattr(os, "link", noting("name", os.link))
    durable.write_file(tmp_path / "a", b"new")
    assert calls == ["content", "name", "folder"]
    calls.clear()
    durable.publish(tmp_path / "a", tmp_path / "b")
    assert calls == ["name", "folder"]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """macOS, whose file system refuses F_FULLFSYNC with the error that is put in front; what was called."""
    calls: list[str] = []

    def full_sync(descriptor: int, command: int) -> None:
        calls.append("full")
        if calls[0].isdigit():
            raise OSError(int(calls[0]), "refused")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full_sync)
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    return calls


@pytest.mark.parametrize("refusal", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_volumes_without_full_sync(refusal: int, synced: list[str]) -> None:
    """Guards: on a network volume, every file that is written ending in an error."""
    synced.append(str(refusal))
    durable.sync(0)
    assert synced[1:] == ["full", "fsync"]


def test_a_failed_full_sync_is_fatal(synced: list[str]) -> None:
    """Guards: data that the drive has lost called safe, since a second, weaker call went well."""
    synced.append(str(errno.EIO))
    with pytest.raises(OSError, match="refused"):
        durable.sync(0)
    assert synced[1:] == ["full"]


def test_full_sync_is_enough(synced: list[str]) -> None:
    """Guards: a sync that stops at the drive's cache."""
    durable.sync(0)
    assert synced == ["full"]


@pytest.mark.parametrize(("error", "is_fatal"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_synced(
    error: int, is_fatal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: on file systems that do not know how to sync a folder, every rename ending in an error."""

    def refuse(descriptor: int) -> None:
        raise OSError(error, "refused")

    monkeypatch.setattr(os, "fsync", refuse)
    if is_fatal:
        with pytest.raises(OSError, match="refused"):
            durable.sync_folder(tmp_path)
    else:
        durable.sync_folder(tmp_path)


def test_write_file_replaces(tmp_path: Path) -> None:
    """Guards the mode and the content of small files."""
    path = tmp_path / "a"
    durable.write_file(path, b"secret", mode=0o600)
    assert path.read_bytes() == b"secret"
    assert path.stat().st_mode & 0o777 == 0o600


def test_second_process_is_told_the_lock(tmp_path: Path) -> None:
    """Guards against two runs writing one output."""
    code = (
        "import sys, pathlib; from dsmoe_local.base.durable import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    output = tmp_path / "model.gguf"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError) as caught, durable.locked(output):
            pass
        assert ".model.gguf.lock" in str(caught.value)
        holder.kill()
    with durable.locked(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_journal_cuts_a_torn_line(tmp_path: Path) -> None:
    """Guards against trusting a line that was being written when the power went."""
    path = tmp_path / "journal"
    with durable.Journal(path) as journal:
        journal.append({"a": 1}, "b")
    with path.open("ab") as file:
        file.write(b'{"half": ')
    with durable.Journal(path) as journal:
        assert journal.entries == [{"a": 1}, "b"]
        journal.append("c")
    with durable.Journal(path) as journal:
        assert journal.entries == [{"a": 1}, "b", "c"]


def journal_of(path: Path, *entries: object) -> bytes:
    with durable.Journal(path) as journal:
        journal.append(*entries)
    return path.read_bytes()


def without_line(content: bytes, number: int) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(lines[:number] + lines[number + 1 :])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "garbage": lambda content: content.replace(b'"blk.2"', b"xx"),
    "another name": lambda content: content.replace(b'"blk.2"', b'"blk.9"'),
    "a line less": lambda content: without_line(content, 1),
    "a line twice": lambda content: content + content.splitlines(keepends=True)[-1],
    "lines swapped": lambda content: b"".join(reversed(content.splitlines(keepends=True))),
    "an empty line": lambda content: content + b"\n",
    "no checksums": lambda content: b'"blk.1"\n"blk.2"\n',
}


@pytest.mark.parametrize("case", DAMAGE)
def test_journal_refuses_damage(case: str, tmp_path: Path) -> None:
    """Guards against skipping over garbage in the middle, and against believing what was never written: a
    flipped bit that turns the name of a finished tensor into that of one with holes.
    """
    path = tmp_path / "journal"
    path.write_bytes(DAMAGE[case](journal_of(path, "blk.1", "blk.2", "blk.3")))
    with pytest.raises(FileError, match="damaged"):
        durable.Journal(path)


def test_too_little_space_is_said_before_work(tmp_path: Path) -> None:
    """Guards against finding out after an hour."""
    durable.require_space(tmp_path, 1)
    with pytest.raises(NoSpaceError, match="not enough disk space"):
        durable.require_space(tmp_path, 1 << 60)


def test_a_link_in_the_way_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: in a folder that others write to, a link under a foreseen name: the content goes elsewhere."""
    victim, path = tmp_path / "victim", tmp_path / "chat.md"
    victim.write_bytes(b"precious")
    victim.chmod(0o644)
    (tmp_path / f".chat.md.{os.getpid()}").symlink_to(victim)
    durable.write_file(path, b"private", mode=0o600)
    assert victim.read_bytes() == b"precious"
    assert not path.is_symlink()
    # Even under the right name nothing is followed, nor taken over with its mode.
    monkeypatch.setattr("secrets.token_hex", lambda n_bytes: "guessed")
    for lay in (lambda link: link.symlink_to(victim), lambda link: os.link(victim, link)):
        lay(tmp_path / ".guessed.part")
        with pytest.raises(FileExistsError):
            durable.write_file(path, b"more", mode=0o600)
        (tmp_path / ".guessed.part").unlink()
    assert victim.read_bytes() == b"precious"
    assert path.read_bytes() == b"private"


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    """Guards: a temporary name that is longer than the name may be."""
    path = tmp_path / ("n" * 255)
    durable.write_file(path, b"x")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_folders_are_made_durably_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a session acknowledged in a folder that is gone after a power cut; folders between, open to
    all.
    """
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_folder", synced.append)
    folder = tmp_path / "a" / "b" / "c"
    before = os.umask(0)
    try:
        durable.make_folders(folder, 0o700)
    finally:
        os.umask(before)
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent, tmp_path / "a")} == {0o700}
    durable.make_folders(folder, 0o700)
    assert len(synced) == 3
    (tmp_path / "file").touch()
    for inside in ("file", "file/x", "file/x/y"):
        with pytest.raises(OSError, match=r"exists|directory"):
            durable.make_folders(tmp_path / inside)


@pytest.mark.parametrize("links", [True, False])
def test_publishing_takes_nobodys_name(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: what another run has written meanwhile replaced; disks that know no hard links."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    temporary, final = tmp_path / "part", tmp_path / "final"
    temporary.write_bytes(b"mine")
    durable.publish(temporary, final)
    assert final.read_bytes() == b"mine"
    assert not temporary.exists()
    temporary.write_bytes(b"more")
    with pytest.raises(FileExistsError):
        durable.publish(temporary, final)
    assert final.read_bytes() == b"mine"
    final.unlink()
    final.symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        durable.publish(temporary, final)
    assert final.is_symlink()
    assert temporary.read_bytes() == b"more"


def test_reading_takes_what_is_there(tmp_path: Path) -> None:
    """Guards against a gigabyte that is set aside for a file of a few bytes, and a pipe that is cut."""
    path = tmp_path / "small"
    path.write_bytes(b"12345")
    tracemalloc.start()
    try:
        assert durable.read_at_most(path, 1 << 30) == b"12345"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert durable.read_at_most(path, 5) == b"12345"
    assert durable.read_at_most(path, 3) == b"1234"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"12345",))
    writer.start()
    assert durable.read_at_most(pipe, 100) == b"12345"
    writer.join()
