"""A strict GGUF reader. It checks structure, for every architecture; `gguf_model` checks what values mean.

llama.cpp aborts the process on some malformed files and silently accepts others, so every file is read here
before native code opens it. Counts are checked against the file's size before anything is allocated, nothing
recurses, and only the header is read. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from gguf.constants import GGUFValueType

from dsmoe_local.base.errors import FileError, FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import GgmlType, Tensor, block_size, padded

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_VERSIONS = (2, 3)
_MAX_TENSORS = 1 << 17
_MAX_FIELDS = 1 << 16
_MAX_NAME = 64  # GGML_MAX_NAME, with its terminating zero
_MAX_KEY = 65535
_MAX_DIMENSIONS = 4
_MAX_WEIGHTS = 1 << 62
_MAX_HEADER = 256 << 20  # a vocabulary of a million tokens with its merges takes 50 MB
_MAX_ITEMS = 1 << 22  # of all arrays together: each is an object
_WINDOW = 64 << 10  # bytes to read at first; doubled until the header is complete

_SCALARS: Mapping[GGUFValueType, struct.Struct] = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<B"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}
_LENGTH = struct.Struct("<Q")
_WORD = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Field:
    """A metadata value and its type as stored, so that a copy has the same. `item_type` is set for arrays."""

    value: Any
    type: GGUFValueType
    item_type: GGUFValueType | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo(Tensor):
    """A tensor in an existing file. `offset` is that of its data, from the start of the file.

    `part` is the index of the file in `GgufFile.parts`.
    """

    offset: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class GgufPart:
    """One of the files of a model. Its data begins at `data_offset`.

    `identity` is size, modification time in ns, and inode. It changes if the file is changed or replaced.
    """

    path: Path
    data_offset: int
    identity: tuple[int, int, int]

    @property
    def size(self) -> int:
        """Bytes of this file."""
        return self.identity[0]


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a file: metadata and tensors in file order.

    A model may be split into several files, its `parts`; see `gguf_split`. Then metadata and alignment are
    those of the first file, and the tensors are those of all files.
    """

    metadata: Mapping[str, Field]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    parts: tuple[GgufPart, ...]

    @property
    def path(self) -> Path:
        """The file, or the first one of a split model."""
        return self.parts[0].path

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - metadata holds any type
        """Return a metadata value, or `default` if the key is missing."""
        field = self.metadata.get(key)
        return default if field is None else field.value


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file.

    Raises FileError if the file cannot be read, FormatError if anything about its structure is wrong.
    """
    try:
        with path.open("rb") as file:
            identity = identity_of(os.fstat(file.fileno()))
            if file.read(4) != MAGIC:
                raise FormatError(
                    f"{safe_line(path.name)} is not a GGUF file",
                    where=path,
                    remedy="make one from a checkpoint with dsmoe-convert",
                )
            return _Parser(path, identity, file).parse()
    except IsADirectoryError as error:
        raise FileError(
            "a GGUF file is needed, this is a folder",
            where=path,
            remedy="name a file in it, or make one from a checkpoint with dsmoe-convert",
        ) from error
    except OSError as error:
        raise FileError(f"cannot read the model: {error.strerror}", where=path) from error


def identity_of(status: os.stat_result) -> tuple[int, int, int]:
    """Return a file's `GgufPart.identity`."""
    return status.st_size, status.st_mtime_ns, status.st_ino


class _Parser:
    """A cursor over the header's bytes, which are read from `file` when needed, from after the magic on."""

    def __init__(self, path: Path, identity: tuple[int, int, int], file: BinaryIO) -> None:
        self.path = path
        self.identity = identity
        self.size = identity[0]
        self.file = file
        self.data = MAGIC
        self.at = len(MAGIC)
        self.n_items = 0

    def refuse(self, what: str, where: str = "") -> NoReturn:
        raise FormatError(
            f"damaged GGUF file: {what}",
            where=f"{self.path}{': ' if where else ''}{safe_line(where, 80)}",
            remedy="download or convert it again",
        )

    def need(self, count: int, what: str) -> None:
        """Read until `data` has `count` bytes after the cursor."""
        end = self.at + count
        if end > self.size:
            self.refuse(f"it ends in the middle of {what}")
        if end > len(self.data):
            if end > _MAX_HEADER:
                self.refuse(f"its header exceeds {_MAX_HEADER >> 20} MiB")
            wanted = max(end, _WINDOW, 2 * len(self.data))
            self.data += self.file.read(min(self.size, wanted) - len(self.data))
            if end > len(self.data):
                self.refuse(f"it was truncated while {what} was read")

    def take(self, form: struct.Struct, what: str) -> Any:  # noqa: ANN401 - the struct decides
        self.need(form.size, what)
        value = form.unpack_from(self.data, self.at)[0]
        self.at += form.size
        return value

    def string(self, limit: int, what: str) -> str:
        length = self.take(_LENGTH, what)
        if length > min(limit, self.size - self.at):
            self.refuse(f"{what} claims {length} bytes")
        self.need(length, what)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8")

    def value_type(self, what: str) -> GGUFValueType:
        number = self.take(_WORD, what)
        try:
            return GGUFValueType(number)
        except ValueError:
            self.refuse(f"{what} has the unknown type {number}")

    def count_items(self, count: int, key: str) -> None:
        self.n_items += count
        if self.n_items > _MAX_ITEMS:
            self.refuse(f"its arrays have more than {_MAX_ITEMS} items", key)

    def parse(self) -> GgufFile:
        version = self.take(_WORD, "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            self.refuse("it is big-endian" if swapped else f"version {version} is unknown")
        n_tensors = self.take(_LENGTH, "the tensor count")
        n_fields = self.take(_LENGTH, "the metadata count")
        # The shortest tensor entry takes 33 bytes, the shortest field 14.
        if n_tensors > min(_MAX_TENSORS, self.size // 33) or n_fields > min(_MAX_FIELDS, self.size // 14):
            self.refuse(f"it claims {n_tensors} tensors and {n_fields} metadata fields")
        metadata: dict[str, Field] = {}
        for _ in range(n_fields):
            key = self.string(_MAX_KEY, "a metadata key")
            if not key or key in metadata:
                self.refuse("a metadata key is empty or occurs twice", key)
            metadata[key] = self.field(key)
        alignment = self.alignment(metadata)
        entries = [self.tensor() for _ in range(n_tensors)]
        data_offset = padded(self.at, alignment)
        tensors = self.checked_layout(entries, data_offset, alignment)
        return GgufFile(metadata, tensors, alignment, (GgufPart(self.path, data_offset, self.identity),))

    def alignment(self, metadata: Mapping[str, Field]) -> int:
        field = metadata.get("general.alignment")
        if field is None:
            return DEFAULT_ALIGNMENT
        value = field.value
        if field.type is not GGUFValueType.UINT32 or not 8 <= value <= 1 << 20 or value & (value - 1):
            self.refuse(
                f"the alignment {safe_line(str(value), 40)} is not a power of two from 8 to 1048576",
                "general.alignment",
            )
        return int(value)

    def field(self, key: str) -> Field:
        kind = self.value_type(key)
        if kind is GGUFValueType.ARRAY:
            item = self.value_type(key)
            return Field(self.array(key, item), kind, item)
        return Field(self.scalar(key, kind), kind)

    def scalar(self, key: str, kind: GGUFValueType) -> Any:  # noqa: ANN401 - metadata holds any type
        if kind is GGUFValueType.STRING:
            return self.string(self.size, key)
        value = self.take(_SCALARS[kind], key)
        if kind is GGUFValueType.BOOL:
            if value > 1:
                self.refuse(f"a boolean is {value}", key)
            return bool(value)
        return value

    def array(self, key: str, item: GGUFValueType) -> list[Any]:
        count = self.take(_LENGTH, key)
        if item is GGUFValueType.ARRAY:
            self.refuse("arrays inside arrays are not allowed", key)
        if item is GGUFValueType.STRING:
            return self.strings(key, count)
        form = _SCALARS[item]
        if count > (self.size - self.at) // form.size:
            self.refuse(f"an array claims {count} items", key)
        self.count_items(count, key)
        self.need(count * form.size, key)
        values = list(struct.unpack_from(f"<{count}{form.format[-1]}", self.data, self.at))
        self.at += count * form.size
        if item is GGUFValueType.BOOL:
            if any(value > 1 for value in values):
                self.refuse("a boolean is neither 0 nor 1", key)
            return [bool(value) for value in values]
        return values

    def strings(self, key: str, count: int) -> list[str]:
        """Return a string array. One fast loop: a vocabulary has 100,000 tokens and as many merges."""
        if count > (self.size - self.at) // 8:
            self.refuse(f"an array claims {count} strings", key)
        self.count_items(count, key)
        result: list[str] = []
        unpack = _LENGTH.unpack_from
        at, data, end = self.at, self.data, len(self.data)
        try:
            for _ in range(count):
                if at + 8 > end or (stop := at + 8 + unpack(data, at)[0]) > end:
                    self.at = at
                    self.need(8, key)
                    stop = at + 8 + unpack(self.data, at)[0]
                    self.need(stop - at, key)
                    data, end = self.data, len(self.data)
                result.append(data[at + 8 : stop].decode())
                at = stop
        except UnicodeDecodeError:
            self.refuse(f"string {len(result)} is not UTF-8", key)
        self.at = at
        return result

    def tensor(self) -> tuple[str, tuple[int, ...], GgmlType, int]:
        name = self.string(_MAX_NAME - 1, "a tensor's name")
        n_dimensions = self.take(_WORD, name)
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            self.refuse(f"a tensor has {n_dimensions} dimensions", name)
        sizes = [self.take(_LENGTH, name) for _ in range(n_dimensions)]
        if math.prod(sizes) > _MAX_WEIGHTS or min(sizes) < 1:
            self.refuse(f"a tensor has the shape {sizes}", name)
        number = self.take(_WORD, name)
        try:
            kind = GgmlType(number)
        except ValueError:
            self.refuse(f"a tensor has the unknown type {number}", name)
        if sizes[0] % block_size(kind):
            self.refuse(f"{kind.name} needs a multiple of {block_size(kind)} columns, not {sizes[0]}", name)
        return name, tuple(reversed(sizes)), kind, self.take(_LENGTH, name)

    def checked_layout(
        self, entries: list[tuple[str, tuple[int, ...], GgmlType, int]], data_offset: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """Return the tensors by name. Refuse gaps and overlaps between them, as llama.cpp does."""
        tensors: dict[str, TensorInfo] = {}
        end = data_offset
        for name, shape, kind, offset in entries:
            if name in tensors:
                self.refuse("a tensor occurs twice", name)
            if data_offset + offset != end:
                self.refuse(f"a tensor begins at byte {data_offset + offset}, not {end}", name)
            info = TensorInfo(name, shape, kind, end)
            if end + info.n_bytes > self.size:
                self.refuse(f"a tensor ends at byte {end + info.n_bytes}, the file at {self.size}", name)
            tensors[name] = info
            end += padded(info.n_bytes, alignment)
        return tensors
