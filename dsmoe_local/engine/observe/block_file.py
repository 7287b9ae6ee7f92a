"""Files that observers write for other runs: checked blocks of prompt tokens, found by request and place.

    a magic of eight bytes, length and text of a JSON header, then blocks:
    length and CRC-32 of a body; a body is
      n, index (uint32), length of the request's id (uint16), the id in UTF-8, what is told of the n tokens

Numbers are little-endian. What is told of a token, and what it means, is the observers' own.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dsmoe_local.base.durable import locked, replace, sync
from dsmoe_local.base.errors import FileError, FormatError

_VERSION = 1
_HEADER = struct.Struct("<8sI")
_BLOCK = struct.Struct("<II")
_BODY = struct.Struct("<IIH")
_MOST = 1 << 28


class BlockWriter:
    """Appends blocks to a file that gets its name from `publish`, and is called `.part` before.

    What a process that died has left under that name is overwritten: the next one begins anew.
    """

    def __init__(self, path: Path, magic: bytes, header: Mapping[str, int]) -> None:
        """FileError if the file exists already, or cannot be made; LockedError: another run writes it."""
        self._path = path
        self._part: Path | None = path.with_name(f"{path.name}.part")
        self._empty = True
        text = json.dumps({"version": _VERSION, **header}).encode()
        with ExitStack() as made:
            try:
                made.enter_context(locked(path))
                self._require_none("remove it, or name another file")
                self._file: BinaryIO = made.enter_context(self._part.open("wb"))
            except OSError as error:
                raise FileError(f"the reference cannot be written: {error.strerror}", where=path) from error
            self._file.write(_HEADER.pack(magic, len(text)) + text)
            self._made = made.pop_all()

    def _require_none(self, remedy: str) -> None:
        if self._path.exists():
            raise FileError("the reference exists already", where=self._path, remedy=remedy)

    def append(self, request_id: str, index: int, n_tokens: int, told: Sequence[bytes]) -> None:
        """Append what is told of tokens that follow each other, from `index` on."""
        name = request_id.encode()
        body = b"".join([_BODY.pack(n_tokens, index, len(name)), name, *told])
        self._file.write(_BLOCK.pack(len(body), zlib.crc32(body)) + body)
        self._empty = False

    def publish(self) -> None:
        """Force everything to the medium, under the file's own name; a file without tokens gets none.

        FileError if there is another file of that name by now.
        """
        self._file.flush()
        sync(self._file.fileno())
        if self._part is not None and not self._empty:
            self._require_none(f"what was written is {self._part.name}")
            replace(self._part, self._path)
            self._part = None

    def close(self) -> None:
        """Publish and release the file. Closing twice is fine."""
        with self._made:
            if self._file.closed:
                return
            if not self._empty:
                self.publish()
            elif self._part is not None:
                self._part.unlink()


class Place(NamedTuple):
    """Where a token is told of: as the `number`-th of the `n_tokens` of the block told of from `position`."""

    position: int
    n_tokens: int
    number: int


class BlockReader:
    """Finds tokens by request and place in the prompt. The file is checked as a whole when opened."""

    def __init__(self, path: Path, magic: bytes) -> None:
        """FileError if the file cannot be read, FormatError if it is damaged or was not finished."""
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise FileError(f"the reference cannot be read: {reason}", where=path) from error
        # By request: first index, number of tokens and position of each block, in order of the first.
        self._index: dict[str, list[tuple[int, int, int]]] = {}
        self.n_tokens = 0
        try:
            self._header = self._read_index(magic)
            self.check()
        except (struct.error, ValueError, KeyError, TypeError) as error:
            self.close()
            raise FormatError(
                f"the reference is damaged or was not finished: {error}", where=path, remedy="make it again"
            ) from error

    def check(self) -> None:
        """What a reader demands of the header; ValueError, KeyError or TypeError if it is not met."""

    def number(self, key: str) -> int:
        """A number of the header."""
        return int(self._header[key])

    def _read_index(self, magic: bytes) -> dict[str, int]:
        found, length = _HEADER.unpack_from(self._data)
        if found != magic:
            raise ValueError("it does not begin as a reference does")
        position = _HEADER.size + length
        header: dict[str, int] = json.loads(self._data[_HEADER.size : position])
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']} is not known")
        while position < len(self._data):
            size, checksum = _BLOCK.unpack_from(self._data, position)
            position += _BLOCK.size
            body = self._data[position : position + size]
            if size > _MOST or len(body) != size or zlib.crc32(body) != checksum:
                raise ValueError(f"the block at {position} is torn")
            count, index, name_size = _BODY.unpack_from(body)
            told = _BODY.size + name_size
            name = body[_BODY.size : told].decode()
            self._index.setdefault(name, []).append((index, count, position + told))
            self.n_tokens += count
            position += size
        for places in self._index.values():
            places.sort()
        return header

    def place(self, request_id: str, index: int) -> Place | None:
        """Where a request's token is told of; None if it is not."""
        places = self._index.get(request_id, [])
        number = bisect_right(places, index, key=lambda place: place[0]) - 1
        if number < 0:
            return None
        first, count, position = places[number]
        return Place(position, count, index - first) if index - first < count else None

    def read(self, position: int, size: int) -> bytes:
        """Bytes of the file."""
        return self._data[position : position + size]

    def close(self) -> None:
        """Closing twice is fine."""
        self._data.close()
