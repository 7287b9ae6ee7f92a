"""FP8 checkpoints: find the scales of each weight, and multiply by them while rows are read.

The tensor NAME_scale_inv has one scale per block of the weight NAME. In DeepSeek-V3, a block has 128 x 128
weights. Blocks at the right and the lower edge may be partial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsmoe_convert.errors import CheckpointError
from dsmoe_convert.shards import DTYPES, FP8, ShardSource, StoredTensor
from dsmoe_local.base.text import safe_line
from dsmoe_local.model.ggml import GgmlType
from dsmoe_quantize.errors import WeightError
from dsmoe_quantize.write.encoder import Bytes, RowSource

_SUFFIX = "_scale_inv"
_SCALE_DTYPES = ("F32", "BF16")


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of FP8 weights, by the name of the weight. `block` has the rows and columns of a block."""

    block: tuple[int, int]
    tensors: Mapping[str, StoredTensor]


def split_scales(
    tensors: Mapping[str, StoredTensor], block: tuple[int, int] | None, where: str
) -> tuple[dict[str, StoredTensor], Scales | None]:
    """Return the tensors of a checkpoint without the scales, and the scales; None if it is not in FP8.

    `block` is `config_json.read_weight_block`. Raises CheckpointError unless exactly the FP8 weights have
    scales, of the right shape.
    """
    weights = [tensor for tensor in tensors.values() if tensor.dtype == FP8]
    if block is None:
        for weight in weights:
            raise CheckpointError(
                f"{safe_line(weight.name, 60)} is stored as {FP8}, without a quantization_config",
                where=where,
                remedy="use the model's own config.json",
            )
        return dict(tensors), None
    scales = {weight.name: _scale_of(weight, tensors, block, where) for weight in weights}
    used = {scale.name for scale in scales.values()}
    for name in tensors:
        if name.endswith(_SUFFIX) and name not in used:
            raise CheckpointError(
                f"{safe_line(name, 80)} has no {FP8} weight",
                where=where,
                remedy="download the weights again",
            )
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    return rest, Scales(block, scales)


def _scale_of(
    weight: StoredTensor, tensors: Mapping[str, StoredTensor], block: tuple[int, int], where: str
) -> StoredTensor:
    scale = tensors.get(weight.name + _SUFFIX)
    name = safe_line(weight.name + _SUFFIX, 80)
    if scale is None:
        raise CheckpointError(f"{name} is missing", where=where, remedy="download the weights again")
    if len(weight.shape) != len(block):
        raise CheckpointError(
            f"{safe_line(weight.name, 60)} is stored as {FP8}, but is not a matrix",
            where=where,
            remedy="convert the original checkpoint, in BF16, F16 or F32",
        )
    shape = tuple(-(-size // length) for size, length in zip(weight.shape, block, strict=True))
    if scale.shape != shape:
        raise CheckpointError(
            f"{name} has the shape {list(scale.shape)[:4]}, not {list(shape)}",
            where=where,
            remedy=f"the weights do not match weight_block_size = {list(block)} of config.json",
        )
    if scale.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{name} is stored as {safe_line(scale.dtype, 20)}",
            where=where,
            remedy=f"accepted: {', '.join(_SCALE_DTYPES)}",
        )
    return scale


def _e4m3_values() -> NDArray[np.float32]:
    """Return the numbers that the 256 bytes of E4M3 mean: 4 bits of exponent, 3 of mantissa, no infinity."""
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    positive = np.where(exponent > 0, normal, np.ldexp(mantissa / 8, -6))
    positive[127] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


_VALUES = _e4m3_values()


class Fp8Rows:
    """The rows of FP8 matrices of equal shape, one matrix after another, in F32. A RowSource."""

    type = GgmlType.F32

    def __init__(
        self,
        stored: RowSource,
        shards: ShardSource,
        shape: tuple[int, ...],
        scales: Scales,
        names: tuple[str, ...],
    ) -> None:
        """`stored` reads the rows as they are stored, `names` and `shape` are those of the matrices."""
        self._stored = stored
        self._shards = shards
        self._rows, self._columns = shape
        self._block = scales.block
        self._scales = tuple(scales.tensors[name] for name in names)

    def read(self, first_row: int, n_rows: int, scratch: Bytes) -> Bytes:
        """See RowSource. Raises WeightError for a scale that is not finite."""
        n_weights = n_rows * self._columns
        stored = self._stored.read(first_row, n_rows, np.empty(n_weights, np.uint8))
        decoded = scratch[: 4 * n_weights]
        weights = decoded.view(np.float32)
        # With the default mode, numpy writes to a buffer first. All indices are valid.
        _VALUES.take(stored, out=weights, mode="clip")
        part, row = divmod(first_row, self._rows)
        self._multiply(weights.reshape(n_rows, self._columns), self._scales[part], row)
        return decoded

    def _multiply(self, weights: NDArray[np.float32], scale: StoredTensor, first_row: int) -> None:
        """Multiply rows of a matrix, from `first_row` on, by their scales."""
        height, width = self._block
        first, last = first_row // height, (first_row + len(weights) - 1) // height
        for block, scales in enumerate(self._read_scales(scale, first, last + 1), first):
            start, end = max(0, block * height - first_row), (block + 1) * height - first_row
            with np.errstate(over="ignore"):  # the encoder refuses infinite weights
                weights[start:end] *= np.repeat(scales, width)[: self._columns]

    def _read_scales(self, scale: StoredTensor, first: int, end: int) -> NDArray[np.float32]:
        """Return the scales of rows of blocks, from row `first` up to, but not including, `end`."""
        per_row = scale.shape[1]
        n_bytes = DTYPES[scale.dtype].n_bytes
        raw = np.empty((end - first) * per_row * n_bytes, np.uint8)
        self._shards.read_into(scale, first * per_row * n_bytes, raw.data)
        if scale.dtype == "BF16":
            # The upper half of F32.
            raw = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.uint8)
        floats = raw.view(np.float32)
        if not np.isfinite(floats).all():
            row, column = divmod(int(np.argmin(np.isfinite(floats))), per_row)
            raise WeightError(
                "a scale is NaN or infinite",
                tensor=scale.name,
                index=(first + row, column),
                remedy="the source is damaged: download it again",
            )
        return floats.reshape(-1, per_row)
