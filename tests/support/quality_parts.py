"""Parts of benchmarks/quality.py as they might have been measured: figures that are easy to check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.support.quality_bars import ALIKE
from benchmarks.support.quality_eight import EIGHT
from benchmarks.support.quality_points import POINTS
from benchmarks.support.quality_rows import (
    AlikeRow,
    CandidateRow,
    FidelityRow,
    Part,
    PointRow,
    SizeRow,
    SpeedRow,
    StepRow,
    TargetRow,
    part_of,
)
from benchmarks.support.quality_speed import timed_variants
from benchmarks.support.quality_steps import STEPPED
from benchmarks.support.quality_types import BASE, Variant, digest_of, variants
from dsmoe_quantize.write import kernels

SETTINGS: Mapping[str, Any] = {
    "model": "m",
    "text": "held-out.txt",
    "text_digest": "t",
    "n_context": 512,
    "n_windows": 3,
    "n_scored": 765,
    "cache": "f32",
    "predictions": "whole",
    "kernels": kernels.version(),
}
_TIMING: Mapping[str, Any] = {
    "shape": "16b",
    "layers": 6,
    "n_prompt": 512,
    "n_gen": 64,
    "rounds": 3,
    "turns": [2, 6],
    "threads": 2,
    "kernels": kernels.version(),
}
_MACHINE: Mapping[str, Any] = {"cpu": "Some CPU", "load_before": 0.1}
_TRAINING: Mapping[str, Any] = {
    "minutes": 30.0,
    "seed": 0,
    "n_steps": 1234,
    "n_tokens": 2_527_232,
    "n_epochs": 1.25,
    "loss": 3.0,
    "held_out_loss": 3.25,
    "products": "f32",
    "python": "3.11.2",
    "torch": "2.9.1",
}


def fidelity(variant: Variant, bits: float, kl: float, digest: str = "") -> FidelityRow:
    windows = (kl * np.array([0.5, 1.0, 1.5])).tolist()
    return FidelityRow(
        variant.word, variant.imatrix, digest or variant.digest, int(1e6 * bits), bits, 1e5 * bits, 20.0, 0.1,
        kl, kl / 10, kl, 9 * kl, 0.9, 0.8, 0.95, windows,
    )  # fmt: skip


def reference_part() -> Part:
    """Stock types on a line, our recipes below it, and a frontier below them."""
    rows = []
    for number, variant in enumerate(variants()):
        bits = 4.4 + 0.13 * (number % 12)
        rows.append(fidelity(variant, bits, 0.01 * 2 ** (4 - bits) * (0.7 if variant.imatrix else 1)))
    line = tuple(
        fidelity(Variant(f"{bits:g} bpw", imatrix), bits, 0.006 * 2 ** (4 - bits), "of no type")
        for imatrix in (False, True)
        for bits in (4.4, 5.0, 6.0)
    )
    alike = tuple(
        AlikeRow(**asdict(fidelity(Variant(word, imatrix), 5.0, 0.01, "of no type")), base=base)
        for imatrix in (False, True)
        for word, base in ALIKE
    )
    eight = tuple(
        CandidateRow(
            recipe.name,
            imatrix,
            digest_of(recipe, imatrix=imatrix),
            recipe.why,
            0.9,
            1.5,
            4_312_000,
            [0.1] * 3,
        )
        for imatrix in (False, True)
        for recipe in EIGHT
    )
    return part_of(
        "reference",
        {**SETTINGS, "imatrix": "i", "n_calibration": 100},
        rows,
        frontier=line,
        targets=(TargetRow(1000, 995),),
        alike=alike,
        eight=eight,
        facts={
            "n_weights": 13_130_000,
            "n_layers": 6,
            "perplexity": 25.5,
            "perplexity_error": 0.5,
            "training": _TRAINING,
            "costs": "built in",
        },
    )


def steps_part() -> Part:
    """The recipes and a step of each."""
    rows = [StepRow(BASE, False, Variant(BASE, False).digest, "", "", 1000, 100.0, [1.0, 3.0])]
    for word in STEPPED:
        digest = Variant(word, False).digest
        rows.append(StepRow(word, False, digest, "", "", 900, 98.0, [0.5, 1.0]))
        rows.append(StepRow(word, False, digest, "embedding", "Q8_0", 950, 99.0, [0.3, 0.9]))
    return part_of("steps", {**SETTINGS, "text": "calibration.txt", "text_digest": "c"}, rows)


def points_part() -> Part:
    rows = [
        PointRow(
            recipe.name, False, digest_of(recipe, imatrix=False), recipe.why, 950_000_000, 9.9e7,
            [0.1, 0.2, 0.3], [1.5, 1.25, 1.0], [1.1, 1.0, 0.9],
        )
        for recipe in POINTS
    ]  # fmt: skip
    return part_of("points", {**SETTINGS, **_TIMING}, rows, facts=_MACHINE)


def sizes_part(ratios: Mapping[str, float]) -> Part:
    rows = [
        SizeRow(each.word, each.imatrix, each.digest, int(1e9 * ratio), 5 * ratio, 1e8 * ratio)
        for each in variants()
        if (ratio := ratios.get(each.word, 1.0))
    ]
    return part_of("sizes", {"shape": "16b"}, rows)


def speed_part(factor: float = 1.2) -> Part:
    """All types are that much faster than the base at prompts, and as fast at decoding. The control is off by
    a tenth at prompts.
    """
    rows = [
        SpeedRow(
            each.word, False, each.digest, 7e8 if each.word == BASE else 3.5e8, [10, 20, 30],
            [1.0, 2.0, 3.0], [0.9, 1.0, 1.05] if each.word == BASE else [0.9 * ratio, ratio, 5.0],
            [1.0, 1.0, 1.0],
        )
        for each in timed_variants()
        if (ratio := 1.0 if each.word == BASE else factor)
    ]  # fmt: skip
    return part_of("speed", _TIMING, rows, facts=_MACHINE)
