"""Choose one option for each group so that the sum of errors is minimal within all budgets. Plain numbers.

This is a multiple-choice knapsack problem with several budgets. HiGHS solves it as a mixed-integer program:
one binary variable per option, one row per group (exactly one option) and one per budget. The same problem
has the same solution on every machine: the search is limited in nodes, not in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import highspy
import numpy as np
from highspy._core import _Highs

_GAP, _GAP_QUICK = 1e-5, 5e-3
"""How far the error may be above the proven bound, relative to it."""
_NODES = (5_000, 50_000, 500_000)
"""Limits of the search. The next one is used only if no solution at all was found with the last."""
_SMALLEST = 1e-6
"""Differences smaller than this, relative to the largest error of an option, may be rounding errors."""
_SETTINGS: dict[str, bool | int | float | str] = {
    "output_flag": False,
    "parallel": "off",
    "threads": 1,
    "mip_abs_gap": 0.0,
    # HiGHS may exceed a budget within these tolerances. Then `solve` lowers the limit and tries again.
    "mip_feasibility_tolerance": 1e-9,
    "primal_feasibility_tolerance": 1e-9,
}


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a group: the error it causes, and its cost in each budget."""

    error: float
    costs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """The options of each group, at least one each, and the budgets. Errors are finite and not negative."""

    groups: Sequence[Sequence[Option]]
    limits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Solution:
    """`picks` is the index of each group's option. No solution has an error below `bound`.

    `prices` say about how much error one more unit of each budget would save. `is_optimal`: the error is
    within 1e-5 of the bound, relative to it.
    """

    picks: tuple[int, ...]
    error: float
    costs: tuple[int, ...]
    bound: float
    prices: tuple[float, ...]
    is_optimal: bool


def solve(problem: Problem, *, quick: bool = False) -> Solution | None:
    """Return the best solution found, or None if nothing fits. `quick` stops within 0.5% of the bound."""
    limits = problem.limits
    model = _Model(problem)
    bound: float | None = None
    while True:
        found = model.solve(limits, _GAP_QUICK if quick else _GAP)
        if found is None:
            return None
        picks, bound_of_these = found
        # Only the first bound is for the limits of `problem`; those under tighter limits are not.
        bound = bound_of_these if bound is None else bound
        chosen = [options[at] for options, at in zip(problem.groups, picks, strict=True)]
        costs = tuple(sum(option.costs[k] for option in chosen) for k in range(len(limits)))
        over = [max(0, cost - limit) for cost, limit in zip(costs, problem.limits, strict=True)]
        if not any(over):
            break
        limits = tuple(limit - excess for limit, excess in zip(limits, over, strict=True))
    error = float(sum(option.error for option in chosen))
    is_optimal = error <= bound + _GAP * max(error, _SMALLEST * model.unit)
    return Solution(picks, error, costs, min(error, bound), model.prices(limits), is_optimal)


class _Model:
    """The problem in the form of HiGHS: costs relative to their budgets, errors relative to the largest."""

    def __init__(self, problem: Problem) -> None:
        options = [option for group in problem.groups for option in group]
        errors = np.array([option.error for option in options])
        self._sizes = [len(group) for group in problem.groups]
        self.unit = float(errors.max(initial=0.0)) or 1.0
        self._errors = errors / self.unit
        self._scale = np.array([max(limit, 1) for limit in problem.limits], np.float64)
        self._costs = np.array([option.costs for option in options], np.float64).reshape(len(options), -1)

    def solve(self, limits: tuple[int, ...], gap: float) -> tuple[tuple[int, ...], float] | None:
        """Return the option of each group and a lower bound of the error; None if nothing was found."""
        solver = self._solver(limits, integral=True)
        solver.setOptionValue("mip_rel_gap", gap)
        for n_nodes in _NODES:
            solver.setOptionValue("mip_max_nodes", n_nodes)
            solver.run()
            if solver.getInfo().primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
                break
            if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
                return None
        else:
            return None
        chosen = np.array(solver.getSolution().col_value)
        starts = np.cumsum([0, *self._sizes])
        picks = tuple(int(chosen[a:b].argmax()) for a, b in pairwise(starts))
        return picks, float(solver.getInfo().mip_dual_bound) * self.unit

    def prices(self, limits: tuple[int, ...]) -> tuple[float, ...]:
        """Return how much error the last unit of each budget saves: the duals of the linear relaxation."""
        solver = self._solver(limits, integral=False)
        solver.run()
        duals = -np.array(solver.getSolution().row_dual[len(self._sizes) :])
        return tuple(map(float, np.maximum(duals, 0) * self.unit / self._scale))

    def _solver(self, limits: tuple[int, ...], *, integral: bool) -> _Highs:
        n_groups, n_options, n_budgets = len(self._sizes), len(self._errors), len(limits)
        program = highspy.HighsLp()
        program.num_col_, program.num_row_ = n_options, n_groups + n_budgets
        program.col_cost_ = self._errors
        program.col_lower_, program.col_upper_ = np.zeros(n_options), np.ones(n_options)
        program.row_lower_ = np.concatenate([np.ones(n_groups), np.full(n_budgets, -np.inf)])
        program.row_upper_ = np.concatenate([np.ones(n_groups), np.array(limits) / self._scale])
        matrix = program.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        columns = np.arange(n_options)
        matrix.start_ = np.cumsum([0, *self._sizes, *[n_options] * n_budgets])
        matrix.index_ = np.concatenate([columns, np.tile(columns, n_budgets)])
        matrix.value_ = np.concatenate([np.ones(n_options), (self._costs / self._scale).T.ravel()])
        if integral:
            program.integrality_ = [highspy.HighsVarType.kInteger] * n_options
        # `Highs`, the wrapper with callbacks, prints a banner on stdout.
        solver = _Highs()
        for name, value in _SETTINGS.items():
            solver.setOptionValue(name, value)
        solver.passModel(program)
        return solver
