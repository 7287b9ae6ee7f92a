"""The window of shards by itself: who waits for what, and until when."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.low_disk import ShardWindow
from dsmoe_convert.shards import StoredTensor


def tensor(number: int, dtype: str = "F32") -> StoredTensor:
    return StoredTensor(f"t{number}", dtype, (4,), f"s{number}", 0, 16)


def test_an_unreadable_shard_ends_every_wait(tmp_path: Path) -> None:
    """A read that fails while others wait for a later shard, which no longer fits into the window."""

    def fetch(shard: str) -> tuple[Path, Mapping[str, StoredTensor]]:
        path = tmp_path / shard
        path.write_bytes(bytes(16))
        number = int(shard[1:])
        return path, {f"t{number}": tensor(number, "F16" if number == 1 else "F32")}

    window = ShardWindow(fetch, threading.Event())
    wanted = {f"out{number}": [tensor(number)] for number in (1, 2, 3)}
    assert window.arrange(wanted) == ["out1", "out2", "out3"]
    errors: list[BaseException] = []

    def wait_for_the_third() -> None:
        try:
            window.read_into(tensor(3), 0, memoryview(bytearray(16)))
        except CheckpointError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait_for_the_third, daemon=True)
    waiting.start()
    with pytest.raises(CheckpointError, match="another header"):
        window.read_into(tensor(1), 0, memoryview(bytearray(16)))
    waiting.join(60)
    assert errors
    assert not waiting.is_alive()
    window.close()


def test_a_shard_that_arrives_after_the_end_is_not_kept_open(tmp_path: Path) -> None:
    """Guards: a file that stays open for good when a run is broken off during a download."""
    asked, arrives = threading.Event(), threading.Event()

    def fetch(shard: str) -> tuple[Path, Mapping[str, StoredTensor]]:
        path = tmp_path / shard
        path.write_bytes(bytes(16))
        asked.set()
        assert arrives.wait(60)
        return path, {"t1": tensor(1)}

    window = ShardWindow(fetch, threading.Event())
    window.arrange({"out1": [tensor(1)]})
    assert asked.wait(60)
    window.close()
    arrives.set()
    assert window._thread is not None
    window._thread.join(60)
    assert not window._thread.is_alive()
    assert not is_open(tmp_path / "s1")
    assert not window._present


def is_open(path: Path) -> bool:
    """Return whether this process has the file open."""
    wanted = path.stat()
    for descriptor in os.listdir("/dev/fd"):
        with suppress(OSError):  # that of the list, or another thread's
            if os.path.samestat(os.fstat(int(descriptor)), wanted):
                return True
    return False
