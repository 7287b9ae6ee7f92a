"""Repairs the checksums of changed reference files."""

from __future__ import annotations

import struct
import zlib

_BLOCK = struct.Struct("<II")


def resealed(content: bytes) -> bytes:
    """Return `content` with correct checksums. All lengths must be unchanged."""
    (length,) = struct.unpack_from("<I", content, 8)
    position = 12 + length
    parts = [content[:position]]
    total = zlib.crc32(parts[0])
    while size := _BLOCK.unpack_from(content, position)[0]:
        body = content[position + _BLOCK.size : position + _BLOCK.size + size]
        head = _BLOCK.pack(size, zlib.crc32(body))
        total = zlib.crc32(head, total)
        parts += [head, body]
        position += _BLOCK.size + size
    return b"".join([*parts, _BLOCK.pack(0, total)])
