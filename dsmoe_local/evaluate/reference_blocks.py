"""Files of blocks of consecutive prompt tokens. A token is found by its request id and index.

    magic (8 bytes), length of a JSON header, the header
    blocks: length and CRC-32 of a body, the body:
        n, index of the first token, length of the request id (uint32), the id in UTF-8, data of n tokens
    0 in place of a length, CRC-32 of the header and of all blocks' lengths and CRC-32s

All numbers are little-endian.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from dsmoe_local.base.durable import locked, publish, sync
from dsmoe_local.base.errors import FileError, FormatError

_VERSION = 2
_HEADER = struct.Struct("<8sI")
_BLOCK = struct.Struct("<II")
_BODY = struct.Struct("<III")
_MAX_BODY = 1 << 28
_MAX_HEADER = 1 << 12

Decoded = TypeVar("Decoded")


class BlockWriter:
    """Writes blocks to `.NAME.part` beside `path`, which `finish` completes, verifies and renames to `path`.

    The partial file of a killed process is replaced.
    """

    def __init__(self, path: Path, magic: bytes, header: Mapping[str, int]) -> None:
        """Create the partial file. Raises FileError if `path` exists, LockedError if another run has it."""
        self._path, self._magic = path, magic
        self._part = path.with_name(f".{path.name}.part")
        self._is_empty, self._is_failed, self._is_complete, self._is_named = True, False, False, False
        text = json.dumps({"version": _VERSION, **header}).encode()
        head = _HEADER.pack(magic, len(text)) + text
        self._checksum = zlib.crc32(head)
        with ExitStack() as stack, self._write_errors():
            stack.enter_context(locked(path))
            if os.path.lexists(path):
                raise self._exists("remove it, or name another file")
            self._part.unlink(missing_ok=True)
            # Private, since it contains tokens of the text. O_EXCL: nobody can place a link here meanwhile.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._file = os.fdopen(os.open(self._part, flags, 0o600), "wb")
            self._file.write(head)
            self._lock = stack.pop_all()

    def append(self, request_id: str, index: int, n_tokens: int, data: Sequence[bytes]) -> None:
        """Append the data of consecutive tokens; the first has the index `index`. Raises FileError."""
        if self._is_complete:
            raise FileError(
                "the reference is complete: nothing can be added", where=self._path, remedy="record a new one"
            )
        name = request_id.encode("utf-8", "surrogatepass")
        body = b"".join([_BODY.pack(n_tokens, index, len(name)), name, *data])
        head = _BLOCK.pack(len(body), zlib.crc32(body))
        with self._write_errors():
            self._file.write(head + body)
        self._checksum = zlib.crc32(head, self._checksum)
        self._is_empty = False

    def finish(self) -> None:
        """Sync and verify the file, and rename it to `path`. Do nothing if it has no blocks or is renamed.

        Raises FileError, also if `path` exists by now; FormatError if the file cannot be read back.
        """
        if self._is_empty or self._is_named:
            return
        with self._write_errors():
            if not self._is_complete:
                self._file.write(_BLOCK.pack(0, self._checksum))
                self._file.flush()
                sync(self._file.fileno())
                self._is_complete = True
            BlockReader(self._part, self._magic).close()
            try:
                publish(self._part, self._path)
            except FileExistsError as error:
                raise self._exists(f"the new one is {self._part.name}: rename it") from error
        self._is_named = True

    def close(self) -> None:
        """Finish and close the file. May be called twice."""
        if self._file.closed:
            return
        with self._lock:
            try:
                self.finish()
            finally:
                # Closing writes the buffer, and the disk may be full.
                with suppress(OSError):
                    self._file.close()
                if not self._is_complete:
                    self._part.unlink(missing_ok=True)

    def _exists(self, remedy: str) -> FileError:
        return FileError("the reference exists already", where=self._path, remedy=remedy)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turn OSError into FileError. Then a block may be incomplete, so all further calls fail."""
        if self._is_failed:
            raise FileError(
                "the reference is incomplete: it could not be written",
                where=self._path,
                remedy="record it again",
            )
        try:
            yield
        except OSError as error:
            self._is_failed = True
            raise FileError(f"the reference cannot be written: {error.strerror}", where=self._path) from error


class _Block(NamedTuple):
    """The index of a block's first token, their number, and the position of the data in the file."""

    first: int
    n_tokens: int
    offset: int
    size: int


class BlockReader(Generic[Decoded]):
    """Finds tokens by request id and index. Subclasses decode blocks; the last decoded one is cached."""

    def __init__(self, path: Path, magic: bytes) -> None:
        """Read and check the whole file. Raises FileError, and FormatError if it is damaged or incomplete."""
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise FileError(f"the reference cannot be read: {reason}", where=path) from error
        self._blocks: dict[str, list[_Block]] = {}
        self._decoded: tuple[int, Decoded] | None = None
        self.n_tokens = 0
        try:
            self._header = self._read_index(magic)
            self.check_header()
        except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
            self.close()
            raise self.damaged(str(error)) from error

    def check_header(self) -> None:
        """Read the numbers in the header. Raises ValueError or KeyError."""

    def decode(self, data: bytes, n_tokens: int) -> Decoded:
        """Decode the data of a block. Raises FormatError."""
        raise NotImplementedError

    def block_of(self, request_id: str, index: int) -> tuple[Decoded, int] | None:
        """Return the decoded block that contains a token, and its index there; None if there is none."""
        blocks = self._blocks.get(request_id, [])
        number = bisect_right(blocks, index, key=lambda block: block.first) - 1
        if number < 0 or index - blocks[number].first >= blocks[number].n_tokens:
            return None
        first, n_tokens, offset, size = blocks[number]
        if self._decoded is None or self._decoded[0] != offset:
            self._decoded = (offset, self.decode(self._data[offset : offset + size], n_tokens))
        return self._decoded[1], index - first

    def damaged(self, how: str) -> FormatError:
        """Return the error for a damaged file."""
        return FormatError(
            f"the reference is damaged or was not finished: {how}", where=self._path, remedy="make it again"
        )

    def number(self, key: str) -> int:
        """Return a number in the header. Raises ValueError if it is negative or no integer."""
        value = self._header[key]
        if type(value) is not int or value < 0:
            raise ValueError(f"{key} is not a number")
        return value

    def _read_index(self, magic: bytes) -> dict[str, object]:
        found, length = _HEADER.unpack_from(self._data)
        if found != magic:
            raise ValueError("it does not begin with the magic bytes of a reference")
        if length > _MAX_HEADER:
            raise ValueError("its header is too long")
        offset = _HEADER.size + length
        header: dict[str, object] = json.loads(self._data[_HEADER.size : offset])
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']} is not known")
        total = zlib.crc32(self._data[:offset])
        while True:
            head = self._data[offset : offset + _BLOCK.size]
            size, checksum = _BLOCK.unpack(head)
            offset += _BLOCK.size
            if not size:
                break
            self._add_block(offset, size, checksum)
            total = zlib.crc32(head, total)
            offset += size
        if checksum != total or offset != len(self._data):
            raise ValueError("its checksum or size is wrong")
        for blocks in self._blocks.values():
            blocks.sort()
        return header

    def _add_block(self, offset: int, size: int, checksum: int) -> None:
        body = self._data[offset : offset + size] if size <= _MAX_BODY else b""
        if len(body) != size or zlib.crc32(body) != checksum:
            raise ValueError(f"the block at offset {offset} is truncated or damaged")
        n_tokens, first, name_size = _BODY.unpack_from(body)
        start = _BODY.size + name_size
        if start > size:
            raise ValueError(f"the block at offset {offset} is too short for its request id")
        name = body[_BODY.size : start].decode("utf-8", "surrogatepass")
        self._blocks.setdefault(name, []).append(_Block(first, n_tokens, offset + start, size - start))
        self.n_tokens += n_tokens

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._data.close()
