"""A second, read-only mapping of a model's file, and what the system can be asked about its pages.

llama.cpp's own mapping shares these pages: what is locked or fetched here is there too. Which pages, and
when, is decided elsewhere. None of this changes what is computed, so what fails only costs speed.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsmoe_local.base.errors import FileError
from dsmoe_local.base.text import safe_line

PAGE = mmap.PAGESIZE
_SMALLEST_READ = 128 << 10  # what the system reads ahead at least, on any device
_KILOBYTE = 1024
_BLOCKS = Path("/sys/dev/block")
_MEASURED_READ = 1 << 20
_MEASURED_SECONDS = 0.2
_MEASURED_DEPTH = 4  # a token's experts are asked for at once, so the disk always has several reads to do


class Range(NamedTuple):
    """Bytes of the file, from `start` to before `end`."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.start


def whole_pages(start: int, end: int) -> Range:
    """The pages that these bytes lie in."""
    return Range(start // PAGE * PAGE, -(-end // PAGE) * PAGE)


class MappedFile:
    """Owns the mapping; any thread may use it until `close`."""

    def __init__(self, path: Path) -> None:
        """Raises FileError."""
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
        """Read these pages and keep them in memory until `close`; False where the system forbids it."""
        return bool(self._mlock(self._address + pages.start, pages.size) == 0)

    def fetch(self, pages: Range) -> None:
        """Begin to read these pages, those that are not in memory; does not wait for them."""
        # The system cuts longer requests off without a word.
        for start in range(pages.start, pages.end, self._fetch_bytes):
            size = min(self._fetch_bytes, pages.end - start)
            self._madvise(self._address + start, size, mmap.MADV_WILLNEED)

    def touch(self, pages: Range) -> None:
        """Read a byte of each page, so that the system takes them for pages in use."""
        self._bytes[pages.start : pages.end : PAGE].max(initial=0)

    def close(self) -> None:
        """Unlock and unmap. Closing twice is fine."""
        self._bytes = np.empty(0, np.uint8)
        self._map.close()


def _fetch_bytes(device: int, blocks: Path = _BLOCKS) -> int:
    """The most bytes that one request to read ahead may have: the larger of two of the device's limits."""
    folder = blocks / f"{os.major(device)}:{os.minor(device)}"
    most = _SMALLEST_READ
    # A partition has the limits of its disk, one folder up.
    for queue in (folder / "queue", folder / ".." / "queue"):
        for name in ("read_ahead_kb", "max_sectors_kb"):
            try:
                most = max(most, int((queue / name).read_text()) * _KILOBYTE)
            except (OSError, ValueError):
                continue  # not a disk of its own: a network file system, macOS
    return most // PAGE * PAGE


def raise_lock_limit() -> None:
    """Let this process lock as much as it may allow itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def read_speed(path: Path) -> float | None:
    """Bytes per second that the disk reads in pieces as large as an expert's, past the system's cache; None
    where that cannot be measured. Takes a fifth of a second.
    """
    size = path.stat().st_size - _MEASURED_READ
    if size <= 0:
        return None
    counts = [0] * _MEASURED_DEPTH
    start = time.perf_counter()

    def work(index: int) -> None:
        generator = np.random.default_rng(index)
        file = _open_uncached(path)
        buffer = mmap.mmap(-1, _MEASURED_READ)  # direct reads need whole pages
        try:
            while time.perf_counter() - start < _MEASURED_SECONDS:
                counts[index] += os.preadv(file, [buffer], int(generator.integers(size // PAGE)) * PAGE)
        except OSError:
            counts[index] = 0  # a file system without direct reads, such as tmpfs
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
