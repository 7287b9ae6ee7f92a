"""Measurements of the machine, and of the memory of a process."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Event, Finished, Note, Started
from dsmoe_local.engine.load.machine import cpu_name
from dsmoe_local.evaluate.speed import machine
from dsmoe_local.evaluate.speed.machine import (
    last_level_cache,
    look_at_machine,
    measure_bandwidth,
    peak_memory,
)

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system keeps no peak")


def test_all_of_the_buffer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: threads that read the same part, a part that nobody reads, a rate of more than was read, a slow
    pass that counts.
    """
    seconds = iter(range(2, 100))
    parts: list[NDArray[np.int64]] = []

    def timed(given: list[NDArray[np.int64]]) -> float:
        parts[:] = given
        assert real_pass(given) > 0
        return next(seconds) / 2

    real_pass = machine._pass_seconds
    monkeypatch.setattr(machine, "_pass_seconds", timed)
    heard: list[Event] = []
    found = measure_bandwidth(3, heard.append, n_bytes=3 << 20)
    assert (found.n_threads, found.n_bytes) == (3, 3 << 20)
    assert [int(part.sum()) for part in parts] == [1 << 17] * 3
    assert len({part.ctypes.data for part in parts}) == 3
    assert found.bytes_per_second == found.n_bytes / 1.0
    assert isinstance(heard[0], Started)
    assert isinstance(heard[-1], Finished)
    assert sum(each.amount for each in heard if isinstance(each, Advanced)) == heard[0].total


def test_threads_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a buffer that was never made and takes no time, so that memory seems infinitely fast."""

    def none(*_: object) -> np.ndarray[Any, Any]:
        raise MemoryError

    monkeypatch.setattr(np, "ones", none)
    with pytest.raises(MemoryError):
        measure_bandwidth(2, n_bytes=1 << 20)


def test_a_stop_ends_it() -> None:
    """Guards: a Ctrl-C that is noticed seconds later, or never."""
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedRunError):
        measure_bandwidth(1, stop=stop, n_bytes=1 << 20)


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    """Guards: KiB taken for KB, the cache of one core, a machine that tells none, files that are no sizes."""
    assert last_level_cache(tmp_path) == 0
    for index, text in enumerate(("48K\n", "2048K\n", "32768K\n", "what\n")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}/size").write_text(text)
    assert last_level_cache(tmp_path) == 32 << 20


def test_the_processors_name(tmp_path: Path) -> None:
    """Guards: the first line that has `model` in it, escape sequences, a system without the file."""
    path = tmp_path / "cpuinfo"
    path.write_text("model\t\t: 6\nmodel name\t: Some\x1b[31m CPU @ 2.00GHz\nmodel name\t: other\n")
    assert cpu_name(path).startswith("Some")
    assert "\x1b" not in cpu_name(path)
    assert "CPU @ 2.00GHz" in cpu_name(path)
    assert cpu_name(tmp_path / "none")


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: figures of a busy machine taken for those of a quiet one."""
    small = measure_bandwidth(1, n_bytes=1 << 20)
    monkeypatch.setattr(machine, "measure_bandwidth", lambda *_: small)
    for load, noted in ((0.05, False), (2.5, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        heard: list[Event] = []
        assert look_at_machine(1, heard.append).load == load
        assert any(isinstance(each, Note) and "busy" in each.text for each in heard) is noted


HOLDS = """
import sys
block = bytearray({size})
block[::4096] = b"x" * len(block[::4096])
del block
print("ready", flush=True)
sys.stdin.read()
"""


@LINUX
def test_a_peak_stays_when_memory_is_given_back() -> None:
    """Guards: what a process has now taken for its peak, KiB for KB, another process's."""
    size = 200 << 20
    command = [sys.executable, "-c", HOLDS.format(size=size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        found = peak_memory(process.pid)
        assert process.stdin is not None
        process.stdin.close()
    assert found is not None
    assert size <= found < size + (64 << 20)
    assert peak_memory(process.pid) is None


def test_where_the_system_keeps_no_peak(tmp_path: Path) -> None:
    """Guards: an error, or nothing, on systems without /proc."""
    command = [sys.executable, "-c", HOLDS.format(size=1)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = peak_memory(process.pid, proc=tmp_path)
        assert process.stdin is not None
        process.stdin.close()
    assert found is None or 1 << 20 < found < 1 << 30
    assert peak_memory(process.pid, proc=tmp_path) is None
