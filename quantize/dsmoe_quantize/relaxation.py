"""Prices for budgets: the lower bound of a multiple-choice problem's error, and how to find the highest one.

With a price for each budget, each group may take its cheapest option by itself; no solution within the
budgets has a smaller error than theirs less what the budgets are worth (Lagrangian relaxation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_N_STEPS, _N_STEPS_QUICK = 26, 18  # golden section over nine decades of a price: to 1e-4 or 1e-2 of it
_DECADES = 9.0
_N_STEPS_NEAR, _DECADES_NEAR = 14, 1.5  # around the prices of a problem that has this one in it
_GOLDEN = (5**0.5 - 1) / 2

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Option:
    """One way for one group: the error it makes, and what it takes from each budget."""

    error: float
    costs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """The options of each group, at least one, and the budgets. Errors are finite and not negative."""

    groups: Sequence[Sequence[Option]]
    limits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Relaxation:
    """The problem as arrays: `errors[group, option]`, `costs[budget, group, option]` in units of `scale`."""

    errors: Floats
    costs: Floats
    exact: tuple[tuple[tuple[int, ...], ...], ...]
    limits: tuple[int, ...]
    scale: Floats

    @classmethod
    def of(cls, problem: Problem, kept: list[list[int]]) -> Relaxation:
        n_groups, width = len(kept), max(map(len, kept), default=1)
        errors = np.full((n_groups, width), np.inf)
        costs = np.zeros((len(problem.limits), n_groups, width))
        scale = np.array([max(limit, 1) for limit in problem.limits], np.float64)
        exact = []
        for group, (options, alive) in enumerate(zip(problem.groups, kept, strict=True)):
            for column, at in enumerate(alive):
                errors[group, column] = options[at].error
                costs[:, group, column] = np.array(options[at].costs) / scale
            exact.append(tuple(options[at].costs for at in alive))
        return cls(errors, costs, tuple(exact), problem.limits, scale)

    def priced(self, prices: Floats) -> Floats:
        """Error plus the price of the costs, of each option."""
        total = self.errors.copy()
        for price, costs in zip(prices, self.costs, strict=True):
            if price:
                total += price * costs
        return total

    def bound(self, prices: Floats) -> float:
        """No solution has a smaller error than this, whatever the prices."""
        return float(self.priced(prices).min(axis=1).sum() - sum(self._used(prices)))

    def _used(self, prices: Floats) -> Floats:
        return prices * np.array(self.limits, np.float64) / self.scale

    def best_prices(self, hint: Floats | None, *, quick: bool = False) -> Floats:
        """The prices that make the bound highest, near `hint`, and 0 where that is. It is concave in them:
        one search within another.
        """
        prices = np.zeros(len(self.limits))
        top = self._top_price()
        if top:
            far = (np.log(top) - _DECADES * np.log(10), np.log(top), _N_STEPS_QUICK if quick else _N_STEPS)
            ranges: list[tuple[float, float, int] | None] = [far] * len(prices)
            for at, price in enumerate(() if hint is None else hint):
                width = _DECADES_NEAR / 2 * np.log(10)
                ranges[at] = (np.log(price) - width, np.log(price) + width, _N_STEPS_NEAR) if price else None
            self._search(prices, 0, ranges)
        return prices

    def largest_step(self, kept: list[list[int]], problem: Problem) -> int | None:
        """The group whose options differ most in what they take; None if no group has a choice."""
        steps = [
            max(
                (max(costs) - min(costs)) / scale
                for costs, scale in zip(
                    zip(*(problem.groups[group][at].costs for at in alive), strict=True),
                    self.scale,
                    strict=True,
                )
            )
            if len(alive) > 1
            else -1.0
            for group, alive in enumerate(kept)
        ]
        group = int(np.argmax(steps)) if steps else 0
        return group if steps and steps[group] >= 0 else None

    def _top_price(self) -> float:
        """A price at which every group takes its cheapest option."""
        highest = 0.0
        for costs in self.costs:
            for errors, column in zip(self.errors, costs, strict=True):
                rows = sorted((c, e) for c, e in zip(column, errors, strict=True) if np.isfinite(e))
                steps = [(b[0] - a[0], a[1] - b[1]) for a, b in pairwise(rows)]
                highest = max([highest, *(saved / more for more, saved in steps if more > 0)])
        return highest * 2

    def _search(self, prices: Floats, at: int, ranges: Sequence[tuple[float, float, int] | None]) -> float:
        """Set prices[at:] to the best for the prices before them; returns the bound."""
        if at == len(prices):
            return self.bound(prices)

        def value(log_price: float | None) -> float:
            prices[at] = 0.0 if log_price is None else np.exp(log_price)
            prices[at + 1 :] = 0.0
            return self._search(prices, at + 1, ranges)

        reach = ranges[at]
        if reach is None:
            return value(None)
        low, high, n_steps = reach
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        at_left, at_right = value(left), value(right)
        for _ in range(n_steps):
            if at_left >= at_right:
                high, right, at_right = right, left, at_left
                left = high - _GOLDEN * (high - low)
                at_left = value(left)
            else:
                low, left, at_left = left, right, at_right
                right = low + _GOLDEN * (high - low)
                at_right = value(right)
        free = value(None)
        return free if free >= max(at_left, at_right) else value(left if at_left >= at_right else right)
