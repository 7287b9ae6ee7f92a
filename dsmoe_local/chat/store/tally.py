"""How many transactions a database has had, beside it: so that a lost write-ahead log is noticed.

SQLite takes a database without its log, or with a damaged one, for what it was before: turns that were on the
disk are gone, and nothing says so. The number in this file is written once a transaction is durable. If the
database then has fewer, some are lost. It may have more: of a process that was killed in between, or where
two wrote at once.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from dsmoe_local.base.durable import sync

_RECORD = struct.Struct("<QI")  # the number, and a checksum of it
_NUMBER = struct.Struct("<Q")


class Tally:
    """The file at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int:
        """The number; 0 if there is none, or no whole one."""
        try:
            number, checksum = _RECORD.unpack(self._path.read_bytes())
        except (OSError, struct.error):
            return 0
        return int(number) if zlib.crc32(_NUMBER.pack(number)) == checksum else 0

    def write(self, number: int) -> None:
        """Put the number down, durably."""
        record = _RECORD.pack(number, zlib.crc32(_NUMBER.pack(number)))
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(descriptor, record, 0)
                sync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            # What it counts is durable; only a loss would go unnoticed.
            return
