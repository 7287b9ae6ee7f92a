"""Files that observers write for other runs: checked blocks of prompt tokens, found by request and place.

    a magic of eight bytes, length and text of a JSON header, then blocks:
    length and CRC-32 of a body; a body is
      n, index and length of the request's id (uint32), the id in UTF-8, what is told of the n tokens
    at the end 0 instead of a length, and the CRC-32 of the header and of all blocks' lengths and CRC-32s

Numbers are little-endian. What is told of a token, and what it means, is the observers' own.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dsmoe_local.base.durable import locked, publish, replace, sync
from dsmoe_local.base.errors import FileError, FormatError

_VERSION = 2
_HEADER = struct.Struct("<8sI")
_BLOCK = struct.Struct("<II")
_BODY = struct.Struct("<III")
_MOST = 1 << 28
_MOST_HEADER = 1 << 12


class BlockWriter:
    """Writes blocks to a file that is called `.part`, and that gets its own name, complete and verified, from
    `publish`. Blocks that follow go into a copy, which replaces it at the next `publish`.

    What a process that died has left under the name of the part is overwritten: the next one begins anew.
    """

    def __init__(self, path: Path, magic: bytes, header: Mapping[str, int]) -> None:
        """FileError if the file exists already, or cannot be made; LockedError: another run writes it."""
        self._path, self._magic = path, magic
        self._part = path.with_name(f"{path.name}.part")
        self._file: BinaryIO | None = None  # the part, if there is one
        self._named: BinaryIO | None = None  # what was published, whatever bears the name by now
        self._is_empty, self._is_sealed, self._is_broken, self._is_closed = True, False, False, False
        text = json.dumps({"version": _VERSION, **header}).encode()
        head = _HEADER.pack(magic, len(text)) + text
        self._checksum = zlib.crc32(head)
        with ExitStack() as made, self._in_words():
            made.enter_context(locked(path))
            if os.path.lexists(path):
                raise self._exists("remove it, or name another file")
            self._file = self._part.open("w+b")
            self._file.write(head)
            self._lock = made.pop_all()

    def append(self, request_id: str, index: int, n_tokens: int, told: Sequence[bytes]) -> None:
        """Append what is told of tokens that follow each other, from `index` on. FileError."""
        name = request_id.encode("utf-8", "surrogatepass")
        body = b"".join([_BODY.pack(n_tokens, index, len(name)), name, *told])
        head = _BLOCK.pack(len(body), zlib.crc32(body))
        with self._in_words():
            self._unsealed().write(head + body)
        self._checksum = zlib.crc32(head, self._checksum)
        self._is_empty = False

    def publish(self) -> None:
        """Force everything to the medium, under the file's own name; a file without tokens gets none.

        FileError, also if there is another file of that name by now; FormatError if what is read again is not
        what was written. What was published before then stays.
        """
        if self._is_empty or self._file is None:
            return
        with self._in_words():
            if not self._is_sealed:
                self._file.write(_BLOCK.pack(0, self._checksum))
                self._file.flush()
                sync(self._file.fileno())
                self._is_sealed = True
            BlockReader(self._part, self._magic).close()
            self._give_name()
        if self._named is not None:
            self._named.close()
        self._named, self._file, self._is_sealed = self._file, None, False

    def close(self) -> None:
        """Publish and release the file. Closing twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        with self._lock:
            try:
                self.publish()
            finally:
                self._release()

    def _unsealed(self) -> BinaryIO:
        """The part, ready for another block; a copy of what was published if there is none."""
        ends = self._is_sealed or self._file is None
        # A copy that breaks off is no whole file: nothing of it stays.
        self._is_sealed = False
        if self._file is None:
            assert self._named is not None
            self._file = self._part.open("w+b")
            self._named.seek(0)
            shutil.copyfileobj(self._named, self._file)
        if ends:
            self._file.truncate(self._file.seek(-_BLOCK.size, os.SEEK_END))
        return self._file

    def _give_name(self) -> None:
        try:
            (replace if self._has_name() else publish)(self._part, self._path)
        except FileExistsError as error:
            raise self._exists(f"what was written is {self._part.name}") from error

    def _has_name(self) -> bool:
        """Whether what was published is still what bears the name."""
        try:
            return self._named is not None and os.path.samestat(
                os.fstat(self._named.fileno()), self._path.lstat()
            )
        except FileNotFoundError:
            return False

    def _release(self) -> None:
        if self._named is not None:
            self._named.close()
        if self._file is None:
            return
        # Closing writes what is buffered, for which there may be no room.
        with suppress(OSError):
            self._file.close()
        if not self._is_sealed:
            self._part.unlink(missing_ok=True)

    def _exists(self, remedy: str) -> FileError:
        return FileError("the reference exists already", where=self._path, remedy=remedy)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Tell what the system refuses. A block may then be written in part: no other may follow it."""
        if self._is_broken:
            raise FileError("the reference is not complete: it could not be written", where=self._path)
        try:
            yield
        except OSError as error:
            self._is_broken = True
            raise FileError(f"the reference cannot be written: {error.strerror}", where=self._path) from error


class Place(NamedTuple):
    """Where a token is told of: it is the `number`-th, from 0, of the `n_tokens` of a block. What is told of
    all of them are the `size` bytes from `position` on.
    """

    position: int
    size: int
    n_tokens: int
    number: int


class _Told(NamedTuple):
    """A block: the index of its first token, and as in Place."""

    first: int
    n_tokens: int
    position: int
    size: int


class BlockReader:
    """Finds tokens by request and place in the prompt. The file is checked as a whole when opened."""

    def __init__(self, path: Path, magic: bytes) -> None:
        """FileError if the file cannot be read, FormatError if it is damaged or was not finished."""
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise FileError(f"the reference cannot be read: {reason}", where=path) from error
        # By request, in order of the first index.
        self._index: dict[str, list[_Told]] = {}
        self.n_tokens = 0
        try:
            self._header = self._read_index(magic)
            self.check()
        except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
            self.close()
            raise self.damaged(str(error)) from error

    def damaged(self, how: str) -> FormatError:
        """The error for a file that is not what was written."""
        return FormatError(
            f"the reference is damaged or was not finished: {how}", where=self._path, remedy="make it again"
        )

    def check(self) -> None:
        """What a reader demands of the header; ValueError, KeyError or TypeError if it is not met."""

    def number(self, key: str) -> int:
        """A number of the header, 0 or more."""
        value = self._header[key]
        if type(value) is not int or value < 0:
            raise ValueError(f"{key} is no number")
        return value

    def _read_index(self, magic: bytes) -> dict[str, object]:
        found, length = _HEADER.unpack_from(self._data)
        if found != magic:
            raise ValueError("it does not begin as a reference does")
        if length > _MOST_HEADER:
            raise ValueError("its header is too long")
        position = _HEADER.size + length
        header: dict[str, object] = json.loads(self._data[_HEADER.size : position])
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']} is not known")
        total = zlib.crc32(self._data[:position])
        while True:
            head = self._data[position : position + _BLOCK.size]
            size, checksum = _BLOCK.unpack(head)
            position += _BLOCK.size
            if not size:
                break
            self._read_block_head(position, size, checksum)
            total = zlib.crc32(head, total)
            position += size
        if checksum != total or position != len(self._data):
            raise ValueError("its end is not that of its beginning")
        for places in self._index.values():
            places.sort()
        return header

    def _read_block_head(self, position: int, size: int, checksum: int) -> None:
        body = self._data[position : position + size] if size <= _MOST else b""
        if len(body) != size or zlib.crc32(body) != checksum:
            raise ValueError(f"the block at {position} is torn")
        count, index, name_size = _BODY.unpack_from(body)
        told = _BODY.size + name_size
        if told > size:
            raise ValueError(f"the block at {position} has no room for its name")
        name = body[_BODY.size : told].decode("utf-8", "surrogatepass")
        self._index.setdefault(name, []).append(_Told(index, count, position + told, size - told))
        self.n_tokens += count

    def place(self, request_id: str, index: int) -> Place | None:
        """Where a request's token is told of; None if it is not."""
        places = self._index.get(request_id, [])
        number = bisect_right(places, index, key=lambda told: told.first) - 1
        if number < 0:
            return None
        first, count, position, size = places[number]
        return Place(position, size, count, index - first) if index - first < count else None

    def read(self, place: Place) -> bytes:
        """All that is told in the block."""
        return self._data[place.position : place.position + place.size]

    def close(self) -> None:
        """Closing twice is fine."""
        self._data.close()
