"""Read-only mappings of a model's files, to lock, prefetch and touch their pages.

llama.cpp's own mapping shares the pages. Nothing here changes results, so a failure only costs speed.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsmoe_local.base.errors import FileError
from dsmoe_local.base.text import safe_line

PAGE = mmap.PAGESIZE
_MIN_READ_AHEAD = 128 << 10  # Linux's default for any device
_KILOBYTE = 1024
_BLOCKS = Path("/sys/dev/block")
_MEASURED_READ = 1 << 20
_MEASURED_SECONDS = 0.2
_MEASURED_DEPTH = 4  # concurrent reads: the experts of a token are requested together


class Range(NamedTuple):
    """The bytes of a file from `start` up to, but not including, `end`. `part` is the index of the file."""

    start: int
    end: int
    part: int = 0

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.start


def whole_pages(start: int, end: int, part: int = 0) -> Range:
    """Return the range of whole pages that contains these bytes."""
    return Range(start // PAGE * PAGE, -(-end // PAGE) * PAGE, part)


class MappedFile:
    """A read-only mapping of a file. Any thread may use it until `close`."""

    def __init__(self, path: Path) -> None:
        """Map the file. Raises FileError."""
        try:
            with path.open("rb") as file:
                self._fetch_bytes = _fetch_bytes(os.fstat(file.fileno()).st_dev)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FileError(f"cannot map {safe_line(path.name)}: {error}", where=path) from error
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._address: int = self._bytes.ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        self._mlock, self._madvise = libc.mlock, libc.madvise
        self._mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def lock(self, pages: Range) -> bool:
        """Read pages and keep them in memory until `close`. Returns False if the system forbids it."""
        return bool(self._mlock(self._address + pages.start, pages.size) == 0)

    def fetch(self, pages: Range) -> None:
        """Start reading the pages that are not in memory, without waiting for them."""
        # The kernel silently truncates longer requests.
        for start in range(pages.start, pages.end, self._fetch_bytes):
            size = min(self._fetch_bytes, pages.end - start)
            self._madvise(self._address + start, size, mmap.MADV_WILLNEED)

    def touch(self, pages: Range) -> None:
        """Read a byte of each page, so that the system does not evict it soon."""
        self._bytes[pages.start : pages.end : PAGE].max(initial=0)

    def close(self) -> None:
        """Unlock and unmap the pages. May be called twice."""
        self._bytes = np.empty(0, np.uint8)
        self._map.close()


class MappedFiles:
    """The mappings of all files of a model, used as one MappedFile. The ranges say which file they are in."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Map the files. Raises FileError."""
        with ExitStack() as mapping:
            self._files = [mapping.enter_context(closing(MappedFile(path))) for path in paths]
            self._mappings = mapping.pop_all()

    def lock(self, pages: Range) -> bool:
        return self._files[pages.part].lock(pages)

    def fetch(self, pages: Range) -> None:
        self._files[pages.part].fetch(pages)

    def touch(self, pages: Range) -> None:
        self._files[pages.part].touch(pages)

    def close(self) -> None:
        self._mappings.close()


def _fetch_bytes(device: int, blocks: Path = _BLOCKS) -> int:
    """Return the largest read-ahead request of a device in bytes: the larger of two limits of its queue."""
    folder = blocks / f"{os.major(device)}:{os.minor(device)}"
    most = _MIN_READ_AHEAD
    # The limits of a partition are those of its disk, one folder up.
    for queue in (folder / "queue", folder / ".." / "queue"):
        for name in ("read_ahead_kb", "max_sectors_kb"):
            try:
                most = max(most, int((queue / name).read_text()) * _KILOBYTE)
            except (OSError, ValueError):
                continue  # not a local disk, or not Linux
    return most // PAGE * PAGE


def raise_lock_limit() -> None:
    """Raise the soft limit for locked memory to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def read_speed(path: Path) -> float | None:
    """Return the bytes per second of random reads of 1 MiB, about an expert's size, without the page cache.

    Returns None if direct reads are not possible. Takes 0.2 seconds.
    """
    size = path.stat().st_size - _MEASURED_READ
    if size <= 0:
        return None
    counts = [0] * _MEASURED_DEPTH
    start = time.perf_counter()

    def work(index: int) -> None:
        generator = np.random.default_rng(index)
        file = _open_uncached(path)
        buffer = mmap.mmap(-1, _MEASURED_READ)  # direct reads need an aligned buffer
        try:
            while time.perf_counter() - start < _MEASURED_SECONDS:
                counts[index] += os.preadv(file, [buffer], int(generator.integers(size // PAGE)) * PAGE)
        except OSError:
            counts[index] = 0  # tmpfs and some other file systems do not support direct reads
        finally:
            os.close(file)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(_MEASURED_DEPTH)]
    try:
        os.close(_open_uncached(path))
    except OSError:
        return None
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    return sum(counts) / seconds if all(counts) else None


def _open_uncached(path: Path) -> int:
    direct: int = getattr(os, "O_DIRECT", 0)
    file = os.open(path, os.O_RDONLY | direct)
    no_cache: int | None = getattr(fcntl, "F_NOCACHE", None)
    if no_cache is not None:
        fcntl.fcntl(file, no_cache, 1)
    return file
