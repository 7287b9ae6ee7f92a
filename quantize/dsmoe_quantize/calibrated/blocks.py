"""The blocks of ggml's types as numbers: a code for each weight, and scales that all codes of a block share.

A weight is `scale * level[code] + offset`. `BlockFormat` reads codes and scales from encoded rows. It writes
other codes and scales into them, so that llama.cpp reads the rows like any others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsmoe_local.model.ggml import GgmlType, block_size, row_bytes
from dsmoe_quantize.write import kernels

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Plane:
    """Some bits of each of several numbers: bits of byte `at[i]`, from `shift[i]` on, are those of number i.

    They are `n_bits` bits of the number, from bit `to` on.
    """

    at: NDArray[np.intp]
    shift: NDArray[np.uint8]
    n_bits: int
    to: int = 0

    def read(self, blocks: Bytes) -> Bytes:
        """Return the bits in `blocks` (n_blocks, n_bytes) at their place in the numbers."""
        found = np.take(blocks, self.at, axis=1)
        found >>= self.shift
        found &= np.uint8((1 << self.n_bits) - 1)
        found <<= np.uint8(self.to)
        return found

    def write(self, blocks: Bytes, numbers: Bytes) -> None:
        """Replace the bits in `blocks` by those of `numbers`."""
        mask = (1 << self.n_bits) - 1
        for shift in np.unique(self.shift):
            # Numbers with the same shift are in different bytes.
            these = np.flatnonzero(self.shift == shift)
            bits = (numbers[:, these] >> np.uint8(self.to)) & np.uint8(mask)
            kept = blocks[:, self.at[these]] & np.uint8(~(mask << int(shift)) & 0xFF)
            blocks[:, self.at[these]] = kept | (bits << np.uint8(shift))


def _plane(at: Iterable[int], shift: int | Iterable[int], n_bits: int, to: int = 0) -> Plane:
    places = np.fromiter(at, np.intp)
    shifts = np.full(len(places), shift) if isinstance(shift, int) else np.fromiter(shift, np.uint8)
    return Plane(places, shifts.astype(np.uint8), n_bits, to)


def _read(planes: Sequence[Plane], blocks: Bytes) -> Bytes:
    first, *others = planes
    numbers = first.read(blocks)
    for plane in others:
        numbers |= plane.read(blocks)
    return numbers


@dataclass(frozen=True)
class BlockFormat:
    """The format of the blocks of one type.

    `codes` say where the bits of the codes are, and `levels` what a code stands for. `d` and `minimum` are
    the byte offsets of the block's scale and offset in f16. In types with sub-blocks, `scales` and `minima`
    are the integers that these are multiplied by, and `scale_zero` is the integer that stands for 0.
    """

    type: GgmlType
    codes: tuple[Plane, ...]
    levels: Floats
    d: int = 0
    minimum: int | None = None
    scales: tuple[Plane, ...] = ()
    minima: tuple[Plane, ...] = ()
    scale_zero: int = 0
    code_flip: int = 0
    """Bits of codes that are stored inverted."""
    scale_flip: int = 0
    """The same of the integer scales."""
    n_scales: int = 1
    """Sub-blocks of a block."""

    @property
    def size(self) -> int:
        """Weights of a block."""
        return block_size(self.type)

    @property
    def sub_size(self) -> int:
        """Weights that share a scale."""
        return self.size // self.n_scales

    @property
    def supers(self) -> tuple[int, ...]:
        """Byte offsets of the f16 numbers of a block: its scale, and its offset if there is one."""
        return (self.d,) if self.minimum is None else (self.d, self.minimum)

    def blocks(self, rows: Bytes) -> Bytes:
        """Return encoded rows as (n_blocks, bytes of a block), without copying them."""
        return rows.reshape(-1, row_bytes(self.type, self.size))

    def write_codes(self, rows: Bytes, codes: Bytes) -> None:
        """Replace the codes in encoded rows."""
        flat = codes.reshape(-1, self.size) ^ np.uint8(self.code_flip)
        blocks = self.blocks(rows)
        for plane in self.codes:
            plane.write(blocks, flat)

    def read_supers(self, rows: Bytes) -> Floats:
        """Return the f16 numbers of each block, as f32, shape (n_blocks, 1 or 2)."""
        blocks = self.blocks(rows)
        found = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16) for at in self.supers]
        return np.concatenate(found, axis=1).astype(np.float32)

    def write_supers(self, rows: Bytes, values: Floats) -> None:
        """Replace the f16 numbers of each block."""
        blocks = self.blocks(rows)
        for number, at in enumerate(self.supers):
            halves = np.ascontiguousarray(values[:, number : number + 1].astype(np.float16))
            blocks[:, at : at + 2] = halves.view(np.uint8)

    def multipliers(self, rows: Bytes) -> Floats:
        """Return what each sub-block multiplies the f16 numbers by, (n_blocks, n_scales, 1 or 2).

        The offset's multiplier is negative in types that subtract it.
        """
        blocks = self.blocks(rows)
        shape = (len(blocks), self.n_scales)
        if not self.scales:
            return np.ones((*shape, len(self.supers)), np.float32)
        stored = _read(self.scales, blocks) ^ np.uint8(self.scale_flip)
        found = [stored.astype(np.float32) - np.float32(self.scale_zero)]
        if self.minima:
            found.append(-_read(self.minima, blocks).astype(np.float32))
        return np.stack(found, axis=2)

    def read_scales(self, rows: Bytes, n_columns: int) -> tuple[Floats, Floats | None]:
        """Return the scale and the offset of each sub-block, (n_rows, n_columns / sub_size) each.

        There are no offsets in types that have none.
        """
        found = self.read_supers(rows)[:, None, :] * self.multipliers(rows)
        shape = (-1, n_columns // self.sub_size)
        scales = np.ascontiguousarray(found[..., 0]).reshape(shape)
        return scales, np.ascontiguousarray(found[..., 1]).reshape(shape) if found.shape[2] > 1 else None


def encode(kind: GgmlType, weights: Floats, importance: Floats | None) -> Bytes:
    """Encode a matrix with ggml, as bytes (n_rows, bytes of a row). `importance` is one f32 per column."""
    n_rows, n_columns = weights.shape
    weights = np.ascontiguousarray(weights)
    rows = np.empty((n_rows, row_bytes(kind, n_columns)), np.uint8)
    address = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        address = importance.ctypes.data
    kernels.encoder(kind)(weights.ctypes.data, rows.ctypes.data, n_rows, n_columns, address)
    return rows


def decode(kind: GgmlType, rows: Bytes, n_columns: int) -> Floats:
    """Decode rows with ggml, as (n_rows, n_columns)."""
    rows = np.ascontiguousarray(rows)
    weights = np.empty((rows.nbytes // row_bytes(kind, n_columns), n_columns), np.float32)
    kernels.decoder(kind)(rows.ctypes.data, weights.ctypes.data, weights.size)
    return weights


def _nibbles(start: int, n_weights: int, n_together: int) -> Plane:
    """Return the plane of 4-bit codes: of each 2 n weights, the first n are low nibbles, the others high."""
    index = np.arange(n_weights)
    group, within = np.divmod(index, 2 * n_together)
    return _plane(start + group * n_together + within % n_together, within // n_together * 4, 4)


def _range(low: int, high: int) -> Floats:
    return np.arange(low, high + 1, dtype=np.float32)


_256 = np.arange(256)
_32 = np.arange(32)
_NONLINEAR = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)
"""The levels of IQ4_NL and IQ4_XS."""

# Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima in 12 bytes, from byte 4 on.
_SIX_BIT_SCALES = (
    _plane([4, 5, 6, 7, 12, 13, 14, 15], 0, 4),
    _plane([4, 5, 6, 7, 4, 5, 6, 7], [4] * 4 + [6] * 4, 2, 4),
)
_SIX_BIT_MINIMA = (
    _plane([8, 9, 10, 11, 12, 13, 14, 15], [0] * 4 + [4] * 4, 4),
    _plane([8, 9, 10, 11, 8, 9, 10, 11], [4] * 4 + [6] * 4, 2, 4),
)
_K_MINIMA = {"minimum": 2, "scales": _SIX_BIT_SCALES, "minima": _SIX_BIT_MINIMA, "n_scales": 8}


def _format(kind: GgmlType, codes: Sequence[Plane], levels: Floats, **others: object) -> BlockFormat:
    return BlockFormat(kind, tuple(codes), levels, **others)  # type: ignore[arg-type]


_FORMATS = (
    _format(GgmlType.Q4_0, [_nibbles(2, 32, 16)], _range(-8, 7)),
    _format(GgmlType.Q4_1, [_nibbles(4, 32, 16)], _range(0, 15), minimum=2),
    _format(
        GgmlType.Q5_0,
        [_nibbles(6, 32, 16), _plane(2 + _32 // 8, _32 % 8, 1, 4)],
        _range(-16, 15),
    ),
    _format(
        GgmlType.Q5_1,
        [_nibbles(8, 32, 16), _plane(4 + _32 // 8, _32 % 8, 1, 4)],
        _range(0, 31),
        minimum=2,
    ),
    _format(GgmlType.Q8_0, [_plane(2 + _32, 0, 8)], _range(-128, 127), code_flip=0x80),
    _format(GgmlType.IQ4_NL, [_nibbles(2, 32, 16)], _NONLINEAR),
    _format(
        GgmlType.IQ4_XS,
        [_nibbles(8, 256, 16)],
        _NONLINEAR,
        scales=(
            _plane(4 + np.arange(8) // 2, np.arange(8) % 2 * 4, 4),
            _plane(2 + np.arange(8) // 4, np.arange(8) % 4 * 2, 2, 4),
        ),
        scale_zero=32,
        n_scales=8,
    ),
    _format(
        GgmlType.Q3_K,
        [
            _plane(32 + _256 // 128 * 32 + _256 % 32, _256 % 128 // 32 * 2, 2),
            _plane(_256 % 32, _256 // 32, 1, 2),
        ],
        _range(-4, 3),
        d=108,
        scales=(
            _plane(96 + np.arange(16) % 8, np.arange(16) // 8 * 4, 4),
            _plane(104 + np.arange(16) % 4, np.arange(16) // 4 * 2, 2, 4),
        ),
        scale_zero=32,
        n_scales=16,
    ),
    _format(GgmlType.Q4_K, [_nibbles(16, 256, 32)], _range(0, 15), **_K_MINIMA),
    _format(
        GgmlType.Q5_K,
        [_nibbles(48, 256, 32), _plane(16 + _256 % 32, _256 // 32, 1, 4)],
        _range(0, 31),
        **_K_MINIMA,
    ),
    _format(
        GgmlType.Q6_K,
        [
            _plane(_256 // 128 * 64 + _256 % 64, _256 % 128 // 64 * 4, 4),
            _plane(128 + _256 // 128 * 32 + _256 % 32, _256 % 128 // 32 * 2, 2, 4),
        ],
        _range(-32, 31),
        d=208,
        scales=(_plane(192 + np.arange(16), 0, 8),),
        scale_zero=128,
        scale_flip=0x80,
        n_scales=16,
    ),
)

FORMATS: Mapping[GgmlType, BlockFormat] = {each.type: each for each in _FORMATS}
"""The types whose codes can be chosen."""
