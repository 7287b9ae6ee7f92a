"""Measures the machine: its processor, load and memory bandwidth, and the peak memory of a process.

The bandwidth limits the decoding speed, since every weight that a token uses is read once per token.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started, ignore
from dsmoe_local.engine.load.machine import available_memory, cpu_name

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_PROC = Path("/proc")
_KILOBYTE = 1024
_BUSY, _BUSY_PER_CORE = 0.3, 0.1  # load averages above which measurements are distorted
_MIN_BUFFER, _MAX_BUFFER = 128 << 20, 2 << 30
_CACHE_MULTIPLE = 8  # size of the buffer in last-level caches
_MEMORY_DIVISOR = 4  # the buffer takes at most a quarter of the available memory
_PASSES = 16
_SECONDS = 2.0  # no pass begins after this time


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second that `n_threads` threads read from memory, in passes over `n_bytes`.

    `cache_bytes` is the size of the last-level cache, 0 if unknown. A model that reads less than that per
    token can exceed the bandwidth.
    """

    bytes_per_second: float
    n_threads: int
    n_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """The state of the machine before a measurement. `load` is the load average, 0 if unknown."""

    cpu: str
    bandwidth: Bandwidth
    load: float


def look_at_machine(
    n_threads: int, listen: Listener = ignore, stop: threading.Event | None = None
) -> Machine:
    """Measure the machine, and send a note if it is busy. Raises InterruptedRunError once `stop` is set."""
    load = _load_average()
    if load > max(_BUSY, _BUSY_PER_CORE * (os.cpu_count() or 1)):
        listen(Note(f"the machine is busy (load {load:.1f}): speeds will be too low, and vary"))
    return Machine(cpu_name(), measure_bandwidth(n_threads, listen, stop), load)


def _load_average() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def measure_bandwidth(
    n_threads: int,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
    *,
    n_bytes: int | None = None,
) -> Bandwidth:
    """Measure how fast threads sum up a buffer. Return the fastest pass.

    `n_bytes` is the size of the buffer (None: a multiple of the cache). Raises InterruptedRunError once
    `stop` is set.
    """
    cache = last_level_cache()
    size = n_bytes or min(
        _MAX_BUFFER, max(_MIN_BUFFER, _CACHE_MULTIPLE * cache), available_memory() // _MEMORY_DIVISOR
    )
    n_words = max(1, size // n_threads // np.dtype(np.int64).itemsize)
    stage = "measuring the memory"
    listen(Started(stage, _PASSES, unit="passes"))
    # Threads fill the buffer, so that a NUMA machine uses all of its memory nodes.
    with ThreadPoolExecutor(n_threads) as executor:
        parts = list(executor.map(lambda _: np.ones(n_words, np.int64), range(n_threads)))
    total = sum(part.nbytes for part in parts)
    best = float("inf")
    began = time.perf_counter()
    for _ in range(_PASSES):
        if stop is not None and stop.is_set():
            raise InterruptedRunError("the measurement was interrupted")
        best = min(best, _pass_seconds(parts))
        listen(Advanced(1, f"{total / best / 1e9:.1f} GB/s"))
        if time.perf_counter() - began > _SECONDS:
            break
    listen(Finished(stage))
    return Bandwidth(total / best, n_threads, total, cache)


def _pass_seconds(parts: Sequence[NDArray[np.int64]]) -> float:
    # Each pass needs new threads: the system wakes existing ones on their last core, which may be the same.
    threads = [threading.Thread(target=np.sum, args=(part,)) for part in parts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def last_level_cache(caches: Path = _CACHES) -> int:
    """Return the size in bytes of the first processor's largest cache, 0 if unknown."""
    sizes = [0]
    for path in caches.glob("index*/size"):
        try:
            # The kernel writes 32768K.
            sizes.append(int(path.read_text(encoding="ascii").strip().removesuffix("K")) * _KILOBYTE)
        except (OSError, ValueError):
            continue
    return max(sizes)


def peak_memory(pid: int, proc: Path = _PROC) -> int | None:
    """Return the peak memory of a running process in bytes, including mapped files; None if it has ended.

    On macOS, which reports no peak, it is the current memory. An engine does not release memory.
    """
    try:
        status = (proc / str(pid) / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None if proc.joinpath("self").exists() else _current_memory(pid)
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * _KILOBYTE
    return None


def _current_memory(pid: int) -> int | None:
    command = ["ps", "-o", "rss=", "-p", str(pid)]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return None
    return int(output) * _KILOBYTE if output.isdigit() else None
