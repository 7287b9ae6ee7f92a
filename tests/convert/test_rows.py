"""Rows of a checkpoint, in the order and the number format of a GGUF: against torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsmoe_convert.rows import BlockRows, StackedRows
from dsmoe_convert.shards import DTYPES, StoredTensor
from dsmoe_local.model.architectures.table import Order
from dsmoe_local.model.layout import RowBlocks
from dsmoe_quantize.errors import WeightError
from dsmoe_quantize.write.encoder import Bytes, Slab, SlabEncoder, TensorJob

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SUBNORMAL = 2.0**-149


class Memory:
    """A ShardSource over one array."""

    def __init__(self, content: Bytes) -> None:
        self.content = content

    def arrange(self, wanted: object) -> Sequence[str]:
        return []

    def read_into(self, tensor: StoredTensor, start: int, buffer: memoryview) -> None:
        first = tensor.offset + start
        buffer[:] = self.content[first : first + len(buffer)].data

    def release(self, names: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        pass


@settings(max_examples=200)
@given(
    half=st.integers(1, 9),
    n_heads=st.integers(1, 4),
    row_bytes=st.sampled_from([2, 6, 8, 130]),
    span=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    room=st.integers(0, 3),
)
def test_any_rows_of_a_rotary_projection(
    half: int, n_heads: int, row_bytes: int, span: tuple[float, float], room: int
) -> None:
    """Rows of a slab that starts or ends within a head, shifted or taken from the wrong half."""
    n_rows = 2 * half * n_heads
    content: Bytes = np.random.default_rng(n_rows).integers(0, 256, n_rows * row_bytes, np.uint8)
    start = min(n_rows - 1, int(span[0] * n_rows))
    end = start + max(1, round(span[1] * (n_rows - start)))
    part = StoredTensor("q", "BF16", (n_rows, row_bytes // 2), "x", 0, content.size)
    blocks = RowBlocks(n_heads, 2 * half, 0, 2 * half, Order.PAIRS)
    rows = BlockRows(StackedRows(Memory(content), (part,)), blocks, row_bytes // 2, 2)
    found = rows.read(start, end - start, np.empty((end - start + room) * row_bytes, np.uint8))
    halves = torch.from_numpy(content).view(n_heads, 2, half, row_bytes)
    expected = halves.transpose(1, 2).reshape(n_rows, row_bytes)[start:end]
    assert found.flags.c_contiguous
    assert found.tobytes() == expected.numpy().tobytes()


def converted(stored: torch.Tensor, target: torch.dtype) -> Bytes:
    """What the encoder writes of a tensor."""
    content = stored.reshape(-1).view(torch.uint8).numpy()
    part = StoredTensor("x", NAMES[stored.dtype], tuple(stored.shape), "x", 0, content.size)
    rows = StackedRows(Memory(content), (part,))
    job = TensorJob("x", tuple(stored.shape), DTYPES[NAMES[target]].ggml, rows)
    encoder, slab = SlabEncoder(), Slab(0, job.n_rows)
    output = encoder.encode(job, slab, encoder.read(job, slab), lambda: False)
    assert output is not None
    return output


def words(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 numbers of a 16-bit type."""
    every: NDArray[np.uint16] = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    return torch.from_numpy(every.view(np.int16)).view(dtype)


def awkward() -> torch.Tensor:
    """f32 numbers at and beside everything that 16-bit types round to, and between; subnormal ones, too."""
    parts = [torch.tensor([0.0, -0.0, SUBNORMAL, -SUBNORMAL, 3e38, -3e38])]
    for dtype in (torch.bfloat16, torch.float16):
        exact = words(dtype).float()
        exact = exact[exact.isfinite()].sort().values
        middle = (exact[:-1].double() + exact[1:].double()).div(2).float()
        for values in (exact, middle):
            parts += [values, *(values.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf))]
    values = torch.cat(parts)
    return values[values.isfinite()]


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_finite_number(dtype: torch.dtype, target: torch.dtype) -> None:
    """A shift or a rounding of our own, subnormal numbers that become zero, a lost sign of zero."""
    stored = awkward() if dtype is torch.float32 else words(dtype)
    stored = stored[stored.isfinite() & stored.float().to(target).isfinite()]
    expected = stored.float().to(target).view(torch.uint8)
    found = converted(stored, target)
    assert found.tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_that_is_not_finite(dtype: torch.dtype, target: torch.dtype) -> None:
    """A NaN with an unusual payload that gets into the file, or is reported at another place."""
    every = words(dtype)
    bad = every[~every.isfinite()]
    assert len(bad) == {torch.bfloat16: 256, torch.float16: 2048}[dtype]
    for number, word in enumerate(bad.view(torch.int16).tolist()):
        stored = torch.ones(3, 700, dtype=dtype)
        at = (number % 3, number * 37 % 700)
        stored.view(torch.int16)[at] = word
        with pytest.raises(WeightError) as caught:
            converted(stored, target)
        assert (caught.value.tensor, caught.value.index) == ("x", at)
        assert caught.value.what == ("a weight is NaN" if stored[at].isnan() else "a weight is infinite")
