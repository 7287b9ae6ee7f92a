"""Activity as the cells of a picture: which layers share a row, which experts a column, what a shade means.

Plain numbers; `heatmap` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from dsmoe_local.experts.activity import Activity, LayerActivity


@dataclass(frozen=True, slots=True)
class Grid:
    """`rows` hold the share of the tokens that chose an expert; None: the layers saw no token.

    A row stands for `layers_per_row` layers, the first of which is in `first_layers`, a column for
    `experts_per_column` experts (the last ones for fewer); shares are means over them.
    """

    rows: tuple[tuple[float | None, ...], ...]
    first_layers: tuple[int, ...]
    layers_per_row: int
    experts_per_column: int

    @property
    def n_columns(self) -> int:
        """Cells in a row."""
        return max(map(len, self.rows), default=0)

    @property
    def values(self) -> Iterator[float]:
        """All shares there are."""
        return (value for row in self.rows for value in row if value is not None)


def grid_of(activity: Activity, max_rows: int, max_columns: int) -> Grid:
    """The finest grid of at most so many rows and columns (at least one each)."""
    per_row = max(1, math.ceil(len(activity.layers) / max(1, max_rows)))
    per_column = max(1, math.ceil(activity.n_routed_experts / max(1, max_columns)))
    groups = [activity.layers[start : start + per_row] for start in range(0, len(activity.layers), per_row)]
    return Grid(
        tuple(tuple(_cells(group, per_column)) for group in groups),
        tuple(group[0].layer for group in groups),
        per_row,
        per_column,
    )


def _cells(layers: Sequence[LayerActivity], per_column: int) -> Iterator[float | None]:
    tokens = sum(layer.tokens for layer in layers)
    counts = [sum(column) for column in zip(*(layer.counts for layer in layers), strict=True)]
    for start in range(0, len(counts), per_column):
        part = counts[start : start + per_column]
        yield sum(part) / (len(part) * tokens) if tokens else None


@dataclass(frozen=True)
class Scale:
    """From shares to shades, 0 to `high`, bent so that an even load (`even`, less than `high`) stands in the
    middle: whether a token uses six of 64 experts or twelve of 14, half of the shades are for those with less
    than their part.
    """

    high: float
    even: float

    @cached_property
    def _power(self) -> float:
        ratio = self.even / self.high if self.high > 0 else 0.5
        return math.log(0.5) / math.log(min(0.99, max(0.001, ratio)))

    def level(self, value: float, n_levels: int) -> int:
        """The shade, from 0 to n_levels - 1."""
        position = min(1.0, value / self.high) if self.high > 0 else 0.0
        return min(n_levels - 1, int(n_levels * position**self._power))

    def value(self, position: float) -> float:
        """The share that stands at a position among the shades, from 0 to 1."""
        return self.high * float(position ** (1 / self._power))


def scale_of(activities: Sequence[Activity], grids: Sequence[Grid]) -> Scale:
    """One scale for pictures of these activities, from the greatest share that they show, or from what is
    well over an even one: where all have their part, none is to look like the busiest.
    """
    high = max((value for grid in grids for value in grid.values), default=0.0)
    shares = [each.experts_per_token / each.n_routed_experts for each in activities if each.tokens]
    even = sum(shares) / max(1, len(shares))
    # No share is more than 1; where all experts are used, that is the even one.
    return Scale(max(high, min(1.0, 2 * even) if even < 1 else 2 * even), even)
