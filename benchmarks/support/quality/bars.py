"""The bars of our recipes, and whether they are met. Takes figures; measures nothing.

A bar is compared with the ratio itself. The interval beside it shows how certain that is. For divergences it
is the 95% bootstrap interval over windows, with the same windows drawn for both sides; what another training
of the model would change is not in it. Both sides have embedding and output in Q8_0, because a small model
has a far larger share of its weights there than a 16B. For speeds the interval is from the lowest
round to the highest, widened by the control: the base timed against itself. A ratio within the spread of the
control is no difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.support.quality.figures import Figures, Part, Reference, SpeedRow
from benchmarks.support.quality.variants import BASE, Variant
from benchmarks.support.runner import Bar, Row, off_by

_DRAWS, _SEED = 10_000, 0
_INTERVAL = (0.025, 0.975)
_LEAST_OF_TARGET = 0.99

SIZE, BYTES, PROMPT, DECODE = "size", "bytes per token", "prompt", "decode"
KL = "KL, same embedding and output"
AUTO = "auto"
REFERENCE_SIZE = "size of the reference"


def at_most(value: float) -> Bar:
    """Return the bar of a ratio that must not be larger."""
    return Bar(value, at_most=True)


BARS: Sequence[tuple[str, str, str, Bar]] = (
    (BASE, PROMPT, BASE, Bar(1.4)),
    (BASE, DECODE, BASE, Bar(0.97)),
    ("q4", SIZE, BASE, at_most(0.92)),
    ("q4", BYTES, BASE, at_most(0.96)),
    ("q4", PROMPT, BASE, Bar(1.5)),
    ("q4", DECODE, BASE, Bar(0.95)),
    ("q4", KL, BASE, at_most(0.65)),
    ("q4", REFERENCE_SIZE, BASE, at_most(1)),
    ("q4-fast", SIZE, BASE, at_most(0.87)),
    ("q4-fast", BYTES, BASE, at_most(0.90)),
    ("q4-fast", PROMPT, BASE, Bar(1.8)),
    ("q4-fast", DECODE, BASE, Bar(1)),
    ("q4-fast", KL, BASE, at_most(1.1)),
    ("q4-fast", REFERENCE_SIZE, BASE, at_most(1)),
    ("q4-small", SIZE, BASE, at_most(0.8)),
    ("q4-small", KL, "Q3_K_L", at_most(1)),
    ("q4-small", REFERENCE_SIZE, BASE, at_most(1)),
)
"""Recipe, measure, what it is compared with, and the bar, without an importance matrix and with one.
Size, bytes and speed are those of the 16B shape. Speeds are those with `--kernels auto`, against the base
repacked, as llama.cpp loads it.
"""
_SIZES: Mapping[str, tuple[str, str]] = {
    SIZE: ("sizes", "n_bytes"),
    BYTES: ("sizes", "n_bytes_per_token"),
    # The header, which holds the tokenizer, counts: it is what is on the disk.
    REFERENCE_SIZE: ("reference", "file_size"),
}
"""The part that has the size, and its field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Row):
    """A comparison of a recipe with another type, both made with an importance matrix or without."""

    recipe: str
    imatrix: bool


def control_of(part: Part[SpeedRow], measure: str) -> float:
    """Return the factor by which speeds are off: the base's worst round against itself, both repacked."""
    return off_by(speed_ratios(_control(part), measure))


def _control(part: Part[SpeedRow]) -> SpeedRow:
    return next(row for row in part.rows if row.type == BASE and row.kernels != AUTO)


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the ratio of two means over the same windows, and its 95% interval. ValueError if the numbers of
    windows differ.
    """
    a, b = np.array(ours), np.array(theirs)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} windows and {len(b)} are no pairs")
    random = np.random.default_rng(_SEED)
    drawn = random.integers(len(a), size=(_DRAWS, len(a)))
    ratios = a[drawn].sum(1) / b[drawn].sum(1)
    low, high = np.quantile(ratios, _INTERVAL).tolist()
    return float(a.sum() / b.sum()), (low, high)


def verdicts(figures: Figures) -> list[Verdict]:
    """Return the verdict on each bar, without an importance matrix and with one."""
    return [verdict_on(figures, *bar, imatrix=imatrix) for imatrix in (False, True) for bar in BARS]


def verdict_on(
    figures: Figures, recipe: str, measure: str, against: str, bar: Bar, *, imatrix: bool
) -> Verdict:
    """Compare a recipe with another type in one measure."""
    variants = Variant(recipe, imatrix), Variant(against, imatrix)
    spread: tuple[float, float] | None = None
    control = 1.0
    if measure in (PROMPT, DECODE):
        speed = figures.speed
        row = next(row for row in speed.rows if (row.type, row.kernels) == (recipe, AUTO))
        ours, theirs = (statistics.median(getattr(each, measure)) for each in (row, _control(speed)))
        ratios, control = speed_ratios(row, measure), control_of(speed, measure)
        result, spread = statistics.median(ratios), (min(ratios) / control, max(ratios) * control)
    elif measure in _SIZES:
        part, field = _SIZES[measure]
        ours, theirs = (getattr(getattr(figures, part).row(each), field) for each in variants)
        result = ours / theirs
    else:
        mine, other = (figures.reference.alike_row(each) for each in variants)
        ours, theirs = mine.kl, other.kl
        result, spread = ratio_of(mine.windows, other.windows)
    return Verdict(
        measure,
        ours,
        against,
        theirs,
        result,
        bar=bar,
        spread=spread,
        control=control,
        recipe=recipe,
        imatrix=imatrix,
    )


def speed_ratios(row: SpeedRow, measure: str) -> Sequence[float]:
    """Return the ratios to the base's speed, one for each round."""
    return row.prompt_ratio if measure == PROMPT else row.decode_ratio


def targets_hold(part: Reference) -> Sequence[tuple[float, bool]]:
    """Return, for each size asked for, the share of it that was used, and whether that is 99% to 100%."""
    shares = [row.file_size / row.budget for row in part.targets]
    return [(share, _LEAST_OF_TARGET <= share <= 1) for share in shares]
