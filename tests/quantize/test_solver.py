"""The solver against trying everything, and what it must keep to where everything is too much."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_quantize.budget import solver
from dsmoe_quantize.budget.solver import Option, Problem, Solution, solve


def by_brute_force(problem: Problem) -> float | None:
    """The least error within the budgets; None if nothing fits."""
    return min(
        (
            sum(option.error for option in picked)
            for picked in itertools.product(*problem.groups)
            if all(
                sum(option.costs[k] for option in picked) <= limit for k, limit in enumerate(problem.limits)
            )
        ),
        default=None,
    )


def check(problem: Problem, solution: Solution) -> None:
    """What holds for every solution: it is what it says it is, and exceeds no budget."""
    picked = [options[at] for options, at in zip(problem.groups, solution.picks, strict=True)]
    assert solution.error == pytest.approx(sum(option.error for option in picked), rel=1e-12)
    assert solution.costs == tuple(
        sum(option.costs[k] for option in picked) for k in range(len(problem.limits))
    )
    assert all(cost <= limit for cost, limit in zip(solution.costs, problem.limits, strict=True))
    assert solution.bound <= solution.error
    assert all(price >= 0 for price in solution.prices)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to six groups of four options and three budgets; many options and errors alike."""
    n_budgets = draw(st.integers(0, 3))
    costs = st.tuples(*[st.integers(0, 30)] * n_budgets)
    errors = st.one_of(st.integers(0, 5).map(float), st.floats(0.001, 1))
    groups = draw(
        st.lists(st.lists(st.builds(Option, errors, costs), min_size=1, max_size=4), min_size=1, max_size=6)
    )
    limits = draw(st.tuples(*[st.integers(0, 25 * len(groups))] * n_budgets))
    return Problem(groups, limits)


@settings(max_examples=150)
@given(problems())
def test_optimal_on_small_cases(problem: Problem) -> None:
    """Guards: rows and columns in the wrong order; a budget that is exceeded; an answer where there is none,
    or none where there is one.
    """
    solution, best = solve(problem), by_brute_force(problem)
    if best is None:
        assert solution is None
        return
    assert solution is not None
    check(problem, solution)
    assert solution.is_optimal
    assert solution.error == pytest.approx(best, rel=2e-5, abs=1e-8)


def model_like(n_groups: int, n_budgets: int, seed: int) -> Problem:
    """Groups of very different size and weight, types as they are: the error falls fourfold with each bit."""
    generator = random.Random(seed)
    groups = []
    for _ in range(n_groups):
        weight, n_weights = 10 ** generator.uniform(-4, -2), generator.randint(5, 400) * 10**5
        share = generator.choice([1.0, 6 / 64])
        groups.append(
            [
                Option(
                    weight * 4**-bits * generator.uniform(0.9, 1.1),
                    (int(n_weights * bits / 8), int(n_weights * bits / 8 * share))[:n_budgets],
                )
                for bits in (4.25, 4.5, 5, 5.5, 6, 6.5625, 8.5)
            ]
        )
    middle = [sum(options[3].costs[k] for options in groups) for k in range(n_budgets)]
    return Problem(
        groups, tuple(int(each * factor) for each, factor in zip(middle, (0.9, 0.93), strict=False))
    )


@pytest.mark.parametrize("n_budgets", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_large_cases(n_budgets: int, seed: int) -> None:
    """Guards: a model's worth of groups that ends far from the optimum, leaves the budget unused, or differs
    from run to run.
    """
    problem = model_like(200, n_budgets, seed)
    solution = solve(problem)
    assert solution is not None
    check(problem, solution)
    assert solution.error <= solution.bound * 1.005
    assert max(cost / limit for cost, limit in zip(solution.costs, problem.limits, strict=True)) > 0.999
    assert solve(problem) == solution


def test_one_group_that_outweighs_all() -> None:
    """Guards: prices alone cannot decide a step larger than all others together, as a small output matrix."""
    small = model_like(30, 1, 0)
    n_bytes = sum(options[3].costs[0] for options in small.groups)
    large = [Option(0.02 * 4**-bits, (int(n_bytes * bits / 6),)) for bits in (4.5, 5.5, 8.5)]
    problem = Problem([large, *small.groups], (int(n_bytes * 1.85),))
    solution = solve(problem)
    assert solution is not None
    check(problem, solution)
    alone = [solve(Problem([[option], *small.groups], problem.limits)) for option in large]
    assert solution.error <= min(each.error for each in alone if each) * 1.0001


def test_quick_is_not_careless() -> None:
    """Guards: a trade-off that is far from what the full search would give, or exceeds a budget."""
    problem = model_like(120, 2, 5)
    quick, full = solve(problem, quick=True), solve(problem)
    assert quick is not None
    assert full is not None
    check(problem, quick)
    assert full.error <= quick.error <= full.error * 1.02


def test_order_of_groups_does_not_matter() -> None:
    """Guards: a choice that depends on the order in which tensors lie in a file."""
    problem = model_like(12, 2, 9)
    order = list(range(12))
    random.Random(1).shuffle(order)
    first, second = solve(problem), solve(Problem([problem.groups[at] for at in order], problem.limits))
    assert first is not None
    assert second is not None
    assert first.is_optimal
    assert second.picks == tuple(first.picks[at] for at in order)


def test_prices_say_what_more_budget_is_worth() -> None:
    """Guards: prices in the wrong unit, with which --explain would compare nonsense."""
    problem = model_like(200, 1, 3)
    solution = solve(problem)
    more = solve(Problem(problem.groups, (problem.limits[0] + problem.limits[0] // 200,)))
    assert solution is not None
    assert more is not None
    saved = (solution.error - more.error) / (problem.limits[0] // 200)
    assert solution.prices[0] == pytest.approx(saved, rel=0.15)


def test_a_budget_exceeded_within_the_tolerance_is_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a file one byte too large, since HiGHS allows for its tolerance."""
    exact = solver._Model.solve

    def tolerant(model: solver._Model, limits: tuple[int, ...], gap: float) -> Any:
        return exact(model, tuple(limit + 1 for limit in limits), gap)

    monkeypatch.setattr(solver._Model, "solve", tolerant)
    found = solve(Problem((((Option(1.0, (0,)), Option(0.0, (1,)))),) * 5, (2,)))
    assert found is not None
    assert (found.costs, found.error) == ((2,), 3.0)
