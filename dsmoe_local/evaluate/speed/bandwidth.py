"""How fast this machine's memory is read: the ceiling of decoding, which reads every weight it uses once.

Measured with numpy: each thread sums its own part of a buffer that no cache holds. The fastest pass counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsmoe_local.base.errors import InterruptedRunError
from dsmoe_local.base.progress import Advanced, Finished, Listener, Started, ignore
from dsmoe_local.engine.load.machine import available_memory

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LEAST, _MOST = 64 << 20, 2 << 30  # bytes of the buffer
_TIMES_CACHE = 4
_SHARE = 4  # one part in so many of the available memory at most
_PASSES = 8
_KILOBYTE = 1024
_SECONDS = 2.0  # after which no further pass begins

_Part = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second that `n_threads` threads read from memory; `n_bytes` were read in each pass.

    `cache_bytes` is the processor's last-level cache, 0 where the system does not tell: a model that reads
    less than that per token can be faster than memory.
    """

    bytes_per_second: float
    n_threads: int
    n_bytes: int
    cache_bytes: int


def measure_bandwidth(
    n_threads: int,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
    *,
    n_bytes: int | None = None,
) -> Bandwidth:
    """Measure it, in a buffer of `n_bytes` [a few times the cache]. Setting `stop` raises
    InterruptedRunError.
    """
    cache = last_level_cache()
    size = n_bytes or min(_MOST, max(_LEAST, _TIMES_CACHE * cache), available_memory() // _SHARE)
    words = max(1, size // n_threads // np.dtype(np.int64).itemsize)
    stage = "measuring the memory"
    listen(Started(stage, _PASSES, unit="passes"))
    parts: list[_Part] = [np.empty(0, np.int64)] * n_threads

    def fill(index: int) -> None:
        # In the threads: a machine with several memories spreads it over them.
        parts[index] = np.ones(words, np.int64)

    _together(n_threads, fill)
    best = float("inf")
    began = time.perf_counter()
    for _ in range(_PASSES):
        if stop is not None and stop.is_set():
            raise InterruptedRunError("the measurement was interrupted")
        best = min(best, _together(n_threads, lambda index: int(parts[index].sum())))
        listen(Advanced(1, f"{_total(parts) / best / 1e9:.1f} GB/s"))
        if time.perf_counter() - began > _SECONDS:
            break
    listen(Finished(stage))
    return Bandwidth(_total(parts) / best, n_threads, _total(parts), cache)


def last_level_cache(caches: Path = _CACHES) -> int:
    """Bytes of the largest cache of the first processor; 0 where the system does not tell."""
    sizes = [0]
    for path in caches.glob("index*/size"):
        try:
            # 32768K, as the kernel writes it.
            sizes.append(int(path.read_text(encoding="ascii").strip().removesuffix("K")) * _KILOBYTE)
        except (OSError, ValueError):
            continue  # one that is not what it should be is none
    return max(sizes)


def _total(parts: list[_Part]) -> int:
    return sum(part.nbytes for part in parts)


def _together(n_threads: int, work: Callable[[int], object]) -> float:
    """Seconds that `work` takes, done for each index in a thread of its own, all at once."""
    failures: list[BaseException] = []
    ready = threading.Barrier(n_threads + 1)

    def run(index: int) -> None:
        try:
            ready.wait()
        except threading.BrokenBarrierError:
            return  # not all of them could be started
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(n_threads)]
    try:
        for thread in threads:
            thread.start()
        ready.wait()
    except BaseException:
        ready.abort()
        raise
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if failures:
        raise failures[0]
    return seconds
