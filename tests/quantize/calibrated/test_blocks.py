"""Codes and scales of encoded blocks, compared with ggml's own decoder bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dsmoe_local.model.ggml import FLOATS, GgmlType, row_bytes
from dsmoe_quantize.calibrated.blocks import FORMATS, BlockFormat, decode, encode
from dsmoe_quantize.write.kernels import WRITABLE

COLUMNS = 512

formats = pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.type.name)


def random_rows(kind: GgmlType, n_rows: int = 48) -> NDArray[Any]:
    """Rows that ggml encoded."""
    generator = np.random.default_rng(0)
    weights = generator.standard_normal((n_rows, COLUMNS), np.float32) * np.float32(0.02)
    weights[1], weights[2, :256], weights[3] = 0, 7e-5, np.abs(weights[3])
    return encode(kind, weights, generator.random(COLUMNS, np.float32))


def read_codes(form: BlockFormat, rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the codes of encoded rows."""
    planes = [plane.read(form.blocks(rows)) for plane in form.codes]
    codes: NDArray[np.uint8] = np.bitwise_or.reduce(planes) ^ np.uint8(form.code_flip)
    return codes.reshape(-1, COLUMNS)


def reconstructed(form: BlockFormat, rows: NDArray[Any]) -> NDArray[Any]:
    """Return the weights that codes and scales stand for, in the operations of ggml's decoder."""
    scales, offsets = form.read_scales(rows, COLUMNS)
    weights = form.levels[read_codes(form, rows)]
    weights = weights.reshape(*scales.shape, form.sub_size) * scales[..., None]
    if offsets is not None:
        weights = weights + offsets[..., None]
    return weights.reshape(len(rows), COLUMNS)


@formats
def test_codes_and_scales_give_the_weights_that_ggml_decodes(form: BlockFormat) -> None:
    """A plane with a wrong byte or shift, or a wrong level, gives other weights."""
    rows = random_rows(form.type)
    np.testing.assert_array_equal(reconstructed(form, rows), decode(form.type, rows, COLUMNS))


@formats
def test_any_codes_and_scales_are_written_bit_by_bit(form: BlockFormat) -> None:
    """Codes that ggml's encoder would not choose, such as -128 in Q8_0, reveal a lost bit."""
    rows = random_rows(form.type)
    generator = np.random.default_rng(1)
    codes = generator.integers(0, len(form.levels), (len(rows), COLUMNS)).astype(np.uint8)
    supers = generator.standard_normal(form.read_supers(rows).shape).astype(np.float32)
    form.write_codes(rows, codes)
    form.write_supers(rows, supers)
    np.testing.assert_array_equal(read_codes(form, rows), codes)
    np.testing.assert_array_equal(form.read_supers(rows), supers.astype(np.float16))
    np.testing.assert_array_equal(reconstructed(form, rows), decode(form.type, rows, COLUMNS))


@formats
def test_writing_what_was_read_changes_nothing(form: BlockFormat) -> None:
    """Bits of a neighbour that are overwritten would change the rows."""
    rows = random_rows(form.type)
    copy = rows.copy()
    form.write_codes(copy, read_codes(form, rows))
    form.write_supers(copy, form.read_supers(rows))
    np.testing.assert_array_equal(copy, rows)


@formats
def test_random_bytes_are_read_as_ggml_reads_them(form: BlockFormat) -> None:
    """Encoded rows may never use a scale's highest bits; random ones use all."""
    generator = np.random.default_rng(2)
    rows = generator.integers(0, 256, (64, row_bytes(form.type, COLUMNS)), np.uint8)
    form.write_supers(rows, generator.standard_normal((len(form.blocks(rows)), len(form.supers)), np.float32))
    np.testing.assert_array_equal(reconstructed(form, rows), decode(form.type, rows, COLUMNS))


def test_every_type_that_can_be_written_has_a_format() -> None:
    """A type without one would be rounded without calibration, and nobody would notice."""
    assert FORMATS.keys() == WRITABLE - FLOATS
