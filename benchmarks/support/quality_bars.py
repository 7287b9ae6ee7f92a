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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.support.quality_figures import FidelityRow, Part, SpeedRow
from benchmarks.support.quality_recipes import BASE, OURS, Variant
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


BARS: Mapping[str, Mapping[str, Bar]] = {
    "q4": {SIZE: at_most(0.95), BYTES: at_most(1), PROMPT: Bar(1), DECODE: Bar(0.95), KL: at_most(0.78)},
    "q4-fast": {
        SIZE: at_most(0.91), BYTES: at_most(1), PROMPT: Bar(1.25), DECODE: Bar(1.05), KL: at_most(0.95)
    },
    "q4-small": {SIZE: at_most(0.86), BYTES: at_most(0.95), PROMPT: Bar(1.1), DECODE: Bar(1.05)},
}  # fmt: skip
"""Against the base, both without an importance matrix and both with. Size, bytes and speed are those of the
16B shape.
"""
BETTER: Mapping[str, str] = {"q4-small": "IQ4_XS", "q8": "Q8_0"}
"""Whose divergence a recipe's must be below."""


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
    row: SpeedRow = part.row(Variant(BASE, False))
    ratios = {PROMPT: row.prompt_ratio, DECODE: row.decode_ratio}[measure]
    return off_by(ratios)


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
    """All that can be told of the parts that are there."""
    found: list[Verdict] = []
    for imatrix in (False, True):
        for word in OURS:
            ours, base = Variant(word, imatrix), Variant(BASE, imatrix)
            if "sizes" in parts:
                found += _of_size(parts["sizes"], ours, base)
            if "speed" in parts:
                found += _of_speed(parts["speed"], ours, base)
            if "reference" in parts:
                found += _of_divergence(parts["reference"], ours, base)
    return found


def _of_size(part: Part, ours: Variant, base: Variant) -> Iterator[Verdict]:
    mine, theirs = part.row(ours), part.row(base)
    bars = BARS.get(ours.word, {})
    ratios = {
        SIZE: mine.n_bytes / theirs.n_bytes,
        BYTES: mine.n_bytes_per_token / theirs.n_bytes_per_token,
    }
    for measure, ratio in ratios.items():
        if measure in bars:
            yield Verdict(ours.word, ours.imatrix, measure, base.word, ratio, bars[measure])
    if ours.word in BETTER and ours.word not in BARS:
        other = part.row(Variant(BETTER[ours.word], ours.imatrix))
        ratio, is_alias = mine.n_bytes / other.n_bytes, mine.digest == other.digest
        yield Verdict(ours.word, ours.imatrix, SIZE, other.type, ratio, at_most(1), is_alias=is_alias)


def _of_speed(part: Part, ours: Variant, base: Variant) -> Iterator[Verdict]:
    bars, mine = BARS.get(ours.word, {}), speed_of(part, ours)
    if mine is None:
        return
    for measure, ratios in ((PROMPT, mine.prompt_ratio), (DECODE, mine.decode_ratio)):
        if measure in bars:
            ratio, control = statistics.median(ratios), control_of(part, measure)
            yield Verdict(
                ours.word,
                ours.imatrix,
                measure,
                base.word,
                ratio,
                bars[measure],
                (min(ratios) / control, max(ratios) * control),
                control=control,
            )


def speed_of(part: Part, variant: Variant) -> SpeedRow | None:
    """The speed of files with the same types, by whatever name."""
    return next((row for row in part.rows if row.digest == variant.digest), None)


def _of_divergence(part: Part, ours: Variant, base: Variant) -> Iterator[Verdict]:
    mine = part.row(ours)
    held = {base.word: BARS.get(ours.word, {}).get(KL)}
    if ours.word in BETTER:
        held[BETTER[ours.word]] = Below(1)
    for word, bar in held.items():
        alike = part.alike_row(ours, word) if ours.word in BARS else part.row(Variant(word, ours.imatrix))
        if bar is not None and alike is not None:
            yield _divergence(mine, alike, word, bar)
    if ours.word in BARS:
        # The header, which holds the tokenizer, counts: it is what is on the disk.
        ratio = mine.file_size / part.row(base).file_size
        yield Verdict(ours.word, ours.imatrix, REFERENCE_SIZE, base.word, ratio, at_most(1))


def _divergence(mine: FidelityRow, theirs: FidelityRow, against: str, bar: Bar) -> Verdict:
    ratio, interval = ratio_of(mine.windows, theirs.windows)
    return Verdict(mine.type, mine.imatrix, KL, against, ratio, bar, interval, mine.digest == theirs.digest)


def targets_hold(part: Part) -> Sequence[tuple[float, bool]]:
    """Of each size asked for: the share of it that was used, and whether that is within 1% under it."""
    shares = [row.file_size / row.budget for row in part.targets]
    return [(share, _LEAST_OF_TARGET <= share <= 1) for share in shares]
