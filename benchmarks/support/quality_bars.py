"""What our recipes are held against, and whether it holds. Takes figures; measures nothing.

A ratio of divergences comes with its 95% bootstrap interval over windows, drawn again and again, the same
ones for both sides. What another training of the model would change is not in it. Both sides have the
recipe's types for embedding and output: a small model has far more of its weights there than a 16B. The bar
is held against the ratio itself.

Of speeds, the interval is from the least of the rounds to the greatest, and further on both sides by what the
control is off: the base timed against itself. A ratio within the control's own spread is no difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.support.quality_figures import Part, SpeedRow
from benchmarks.support.quality_recipes import BASE, Variant
from benchmarks.support.runner import Bar, is_difference, off_by

_DRAWS, _SEED = 10_000, 0
_INTERVAL = (0.025, 0.975)
_LEAST_OF_TARGET = 0.99

SIZE, BYTES, PROMPT, DECODE = "size", "bytes per token", "prompt", "decode"
KL = "KL, same embedding and output"
REFERENCE_SIZE = "size of the reference"


def at_most(value: float) -> Bar:
    """A ratio that may not be larger."""
    return Bar(value, at_most=True)


@dataclass(frozen=True, slots=True)
class Below(Bar):
    """A ratio that must be smaller: as good is not better."""

    def holds(self, ratio: float) -> bool:
        """Whether `ratio` is good enough."""
        return ratio < self.value

    def __str__(self) -> str:
        return f"< {self.value:g}"


COMPARED = ("q4", "q4-fast", "q4-small")
"""The recipes that are compared with the base."""
BARS: Sequence[tuple[str, str, str, Bar]] = (
    ("q8", SIZE, "Q8_0", at_most(1)),
    ("q8", KL, "Q8_0", Below(1)),
    ("q4", SIZE, BASE, at_most(0.95)),
    ("q4", BYTES, BASE, at_most(1)),
    ("q4", PROMPT, BASE, Bar(1)),
    ("q4", DECODE, BASE, Bar(0.95)),
    ("q4", KL, BASE, at_most(0.78)),
    ("q4", REFERENCE_SIZE, BASE, at_most(1)),
    ("q4-fast", SIZE, BASE, at_most(0.91)),
    ("q4-fast", BYTES, BASE, at_most(1)),
    ("q4-fast", PROMPT, BASE, Bar(1.25)),
    ("q4-fast", DECODE, BASE, Bar(1.05)),
    ("q4-fast", KL, BASE, at_most(0.95)),
    ("q4-fast", REFERENCE_SIZE, BASE, at_most(1)),
    ("q4-small", SIZE, BASE, at_most(0.86)),
    ("q4-small", BYTES, BASE, at_most(0.95)),
    ("q4-small", PROMPT, BASE, Bar(1.1)),
    ("q4-small", DECODE, BASE, Bar(1.05)),
    ("q4-small", KL, "IQ4_XS", Below(1)),
    ("q4-small", REFERENCE_SIZE, BASE, at_most(1)),
)
"""Recipe, measure, what it is compared with, and the bar: both without an importance matrix, and both with.
Size, bytes and speed are those of the 16B shape.
"""
_SIZES: Mapping[str, tuple[str, str]] = {
    SIZE: ("sizes", "n_bytes"),
    BYTES: ("sizes", "n_bytes_per_token"),
    # The header, which holds the tokenizer, counts: it is what is on the disk.
    REFERENCE_SIZE: ("reference", "file_size"),
}
"""The part that a size is in, and its field."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A ratio and its bar. `interval` is where it may be, None where nothing is left to chance; `control` the
    factor by which the method is off; `is_alias`: both sides are of the same types, and there is nothing to
    compare.
    """

    recipe: str
    imatrix: bool
    measure: str
    against: str
    ratio: float
    bar: Bar
    interval: tuple[float, float] | None = None
    is_alias: bool = False
    control: float = 1.0

    @property
    def is_difference(self) -> bool:
        """Whether the ratio is further from 1 than that of two files with the same types."""
        return is_difference(self.ratio, self.control)

    @property
    def holds(self) -> bool | None:
        """Whether the bar is met; None for an alias."""
        return None if self.is_alias else self.bar.holds(self.ratio)

    @property
    def is_uncertain(self) -> bool:
        """Whether the interval has both what would meet the bar and what would miss it."""
        return len({self.bar.holds(end) for end in self.interval or ()}) == 2

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return {
            **asdict(self),
            "bar": str(self.bar),
            "holds": self.holds,
            "uncertain": self.is_uncertain,
            "difference": self.is_difference,
        }


def control_of(part: Part, measure: str) -> float:
    """The factor by which speeds are off, at least: that of the base's worst round against itself. KeyError
    if that was not timed.
    """
    return off_by(speed_ratios(part.row(Variant(BASE, False)), measure))


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The ratio of two means over the same windows, and its 95% interval. ValueError if they are not as
    many.
    """
    a, b = np.array(ours), np.array(theirs)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} windows and {len(b)} are no pairs")
    random = np.random.default_rng(_SEED)
    drawn = random.integers(len(a), size=(_DRAWS, len(a)))
    ratios = a[drawn].sum(1) / b[drawn].sum(1)
    low, high = np.quantile(ratios, _INTERVAL).tolist()
    return float(a.sum() / b.sum()), (low, high)


def verdicts(parts: Mapping[str, Part]) -> list[Verdict]:
    """All that the parts at hand allow."""
    return [
        verdict
        for imatrix in (False, True)
        for bar in BARS
        if (verdict := _verdict(parts, *bar, imatrix=imatrix)) is not None
    ]


def _verdict(
    parts: Mapping[str, Part], recipe: str, measure: str, against: str, bar: Bar, *, imatrix: bool
) -> Verdict | None:
    """None if the figures are missing."""
    ours, theirs = Variant(recipe, imatrix), Variant(against, imatrix)
    compared = recipe, imatrix, measure, against
    if measure in (PROMPT, DECODE):
        mine = speed_of(parts["speed"], ours) if "speed" in parts else None
        if mine is None:
            return None
        ratios, control = speed_ratios(mine, measure), control_of(parts["speed"], measure)
        interval = min(ratios) / control, max(ratios) * control
        return Verdict(*compared, statistics.median(ratios), bar, interval, control=control)
    name, attribute = _SIZES.get(measure, ("reference", ""))
    if name not in parts:
        return None
    part = parts[name]
    mine, other = part.row(ours), part.row(theirs)
    if attribute:
        ratio = getattr(mine, attribute) / getattr(other, attribute)
        return Verdict(*compared, ratio, bar, is_alias=mine.digest == other.digest)
    if recipe in COMPARED:
        other = part.alike_row(ours, against)
    if other is None:
        return None
    ratio, interval = ratio_of(mine.windows, other.windows)
    return Verdict(*compared, ratio, bar, interval, mine.digest == other.digest)


def speed_of(part: Part, variant: Variant) -> SpeedRow | None:
    """The speed of files with the same types, by whatever name."""
    return next((row for row in part.rows if row.digest == variant.digest), None)


def speed_ratios(row: SpeedRow, measure: str) -> Sequence[float]:
    """To the base's, round by round."""
    return row.prompt_ratio if measure == PROMPT else row.decode_ratio


def targets_hold(part: Part) -> Sequence[tuple[float, bool]]:
    """Of each size asked for: the share of it that was used, and whether that is within 1% under it."""
    shares = [row.file_size / row.budget for row in part.targets]
    return [(share, _LEAST_OF_TARGET <= share <= 1) for share in shares]
