"""The file that holds what a reference model predicted: its likeliest tokens and the mass of the others.

    "DSMOEREF", length and text of a JSON header {"version", "n_vocab"}, then blocks:
    length and CRC-32 of a body; a body is
      n, index (uint32), length of the request's id (uint16), the id in UTF-8,
      target (int32), its logprob, tail mass (float32), n_entries (int32)   of n tokens each,
      id (int32), logprob (float32)                                         of all entries, likeliest first

Numbers are little-endian, logarithms natural. What goes in is `reference`'s to choose.
"""

from __future__ import annotations

import json
import mmap
import struct
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from dsmoe_local.base.durable import locked, replace, sync
from dsmoe_local.base.errors import FileError, FormatError

_MAGIC = b"DSMOEREF"
_VERSION = 1
_HEADER = struct.Struct("<8sI")
_BLOCK = struct.Struct("<II")
_BODY = struct.Struct("<IIH")
_MOST = 1 << 28


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was predicted of one token: `target` is what really came. `ids` are the likeliest, in order."""

    target: int
    logprob: float
    tail_mass: float
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


class ReferenceWriter:
    """Appends blocks to a file that gets its name from `publish`, and is called `.part` before.

    What a process that died has left under that name is overwritten: the next one begins anew.
    """

    def __init__(self, path: Path, n_vocab: int) -> None:
        """FileError if the file exists already, or cannot be made; LockedError: another run writes it."""
        self._path = path
        self._part: Path | None = path.with_name(f"{path.name}.part")
        self._empty = True
        header = json.dumps({"version": _VERSION, "n_vocab": n_vocab}).encode()
        with ExitStack() as made:
            try:
                made.enter_context(locked(path))
                self._require_none("remove it, or name another file")
                self._file: BinaryIO = made.enter_context(self._part.open("wb"))
            except OSError as error:
                raise FileError(f"the reference cannot be written: {error.strerror}", where=path) from error
            self._file.write(_HEADER.pack(_MAGIC, len(header)) + header)
            self._made = made.pop_all()

    def _require_none(self, remedy: str) -> None:
        if self._path.exists():
            raise FileError("the reference exists already", where=self._path, remedy=remedy)

    def add(self, request_id: str, index: int, predictions: Sequence[Prediction]) -> None:
        """Append tokens that follow each other, from `index` on."""
        name = request_id.encode()
        parts = [_BODY.pack(len(predictions), index, len(name)), name]
        parts += [
            np.array([p.target for p in predictions], "<i4").tobytes(),
            np.array([p.logprob for p in predictions], "<f4").tobytes(),
            np.array([p.tail_mass for p in predictions], "<f4").tobytes(),
            np.array([len(p.ids) for p in predictions], "<i4").tobytes(),
            np.concatenate([p.ids for p in predictions]).astype("<i4").tobytes(),
            np.concatenate([p.logprobs for p in predictions]).astype("<f4").tobytes(),
        ]
        body = b"".join(parts)
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


class ReferenceReader:
    """Finds predictions by request and place in the prompt. The file is checked as a whole when opened."""

    def __init__(self, path: Path) -> None:
        """FileError if the file cannot be read, FormatError if it is damaged or was not finished."""
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise FileError(f"the reference cannot be read: {reason}", where=path) from error
        self._known: tuple[int, list[Prediction]] = (-1, [])
        # By request: first index, number of tokens and offset of each block, in order of the first.
        self._index: dict[str, list[tuple[int, int, int]]] = {}
        self.n_tokens = 0
        try:
            self.n_vocab = self._read_index()
        except (struct.error, ValueError, KeyError, TypeError) as error:
            self.close()
            raise FormatError(
                f"the reference is damaged or was not finished: {error}", where=path, remedy="make it again"
            ) from error

    def _read_index(self) -> int:
        magic, length = _HEADER.unpack_from(self._data)
        if magic != _MAGIC:
            raise ValueError("it does not begin as a reference does")
        position = _HEADER.size + length
        header = json.loads(self._data[_HEADER.size : position])
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']} is not known")
        while position < len(self._data):
            size, checksum = _BLOCK.unpack_from(self._data, position)
            position += _BLOCK.size
            body = self._data[position : position + size]
            if size > _MOST or len(body) != size or zlib.crc32(body) != checksum:
                raise ValueError(f"the block at {position} is torn")
            count, index, name_size = _BODY.unpack_from(body)
            name = body[_BODY.size : _BODY.size + name_size].decode()
            self._index.setdefault(name, []).append((index, count, position))
            self.n_tokens += count
            position += size
        for places in self._index.values():
            places.sort()
        return int(header["n_vocab"])

    def find(self, request_id: str, index: int) -> Prediction | None:
        """What was predicted of a request's token; None if it was not scored."""
        places = self._index.get(request_id, [])
        number = bisect_right(places, index, key=lambda place: place[0]) - 1
        if number < 0:
            return None
        first, count, position = places[number]
        if index - first >= count:
            return None
        if self._known[0] != position:
            self._known = (position, self._read_block(position))
        return self._known[1][index - first]

    def _read_block(self, position: int) -> list[Prediction]:
        count, _, name_size = _BODY.unpack_from(self._data, position)
        position += _BODY.size + name_size

        def take(kind: str, n: int) -> npt.NDArray[np.generic]:
            nonlocal position
            values = np.frombuffer(self._data[position : position + 4 * n], kind)
            position += 4 * n
            return values

        targets, logprobs, masses = take("<i4", count), take("<f4", count), take("<f4", count)
        ends = np.cumsum(take("<i4", count))
        total = int(ends[-1]) if count else 0
        ids, entries = take("<i4", total), take("<f4", total)
        starts = [0, *ends[:-1].tolist()]
        return [
            Prediction(int(targets[j]), float(logprobs[j]), float(masses[j]), ids[a:b], entries[a:b])  # type: ignore[arg-type]
            for j, (a, b) in enumerate(zip(starts, ends.tolist(), strict=True))
        ]

    def close(self) -> None:
        """Closing twice is fine."""
        self._data.close()
