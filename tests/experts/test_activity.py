"""Activity as sums: differences against what happened in between, and its cells."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.routed import observation, tokens

from dsmoe_local.experts.activity import (
    Activity,
    LayerActivity,
    activity_of,
    differences,
    mean_overlap,
    overlap,
)
from dsmoe_local.experts.heatmap import Scale, grid_of, scale_of


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 4), st.integers(2, 12), st.integers(0, 99))
def test_a_difference_is_what_happened_in_between(
    before: int, between: int, n_layers: int, n_experts: int, seed: int
) -> None:
    """Guards: means that are subtracted as if they were sums, and a layer without tokens."""
    n_used = max(1, n_experts // 3)
    seen = tokens(before + between, n_layers, n_experts, n_used, seed)
    earlier = activity_of(observation(seen[:before], n_layers, n_experts))
    later = activity_of(observation(seen, n_layers, n_experts))
    expected = observation(seen[before:], n_layers, n_experts)["layers"]
    assert later.follows(earlier)
    assert (later - earlier).tokens == between
    for found, layer in zip((later - earlier).layers, expected, strict=True):
        assert (found.layer, found.tokens) == (layer["layer"], layer["tokens"])
        if not between:
            assert found.counts == (0,) * n_experts
            continue
        assert list(found.counts) == layer["counts"]
        assert list(found.mass) == pytest.approx(layer["expert_mass"], abs=1e-9)
        assert found.experts_per_token == layer["experts_per_token"]
        assert found.load_entropy == pytest.approx(layer["load_entropy"])
        assert found.load_peak == pytest.approx(layer["load_peak"])
        assert found.unused == layer["unused"]
        assert found.captured_mass == pytest.approx(layer["captured_mass"])
        assert found.captured_deviation == pytest.approx(layer["captured_mass_deviation"], abs=1e-6)
        assert found.router_entropy == pytest.approx(layer["router_entropy"])
        both = layer["routed_norm"] + layer["shared_norm"]
        assert found.shared_share == pytest.approx(layer["shared_norm"] / both)


def test_sums_add_up_again() -> None:
    """Guards: a session that is not the sum of its replies, and the first one, which begins with nothing."""
    seen = tokens(40)
    total = Activity()
    for start in range(0, 40, 10):
        total += activity_of(observation(seen[start : start + 10]))
    whole = activity_of(observation(seen))
    assert [layer.counts for layer in total.layers] == [layer.counts for layer in whole.layers]
    assert total.captured_mass == pytest.approx(whole.captured_mass)
    assert not total.follows(whole + whole)


def test_busiest_experts_come_first_and_unused_never() -> None:
    """Guards: experts that nobody chose among the busiest of a layer."""
    layer = LayerActivity(1, 10, (0, 7, 3, 7, 0), (0.0, 0.5, 0.4, 0.6, 0.0))
    assert layer.busiest(9) == [(3, 0.7), (1, 0.7), (2, 0.3)]
    assert layer.busiest(1) == [(3, 0.7)]


@given(st.integers(1, 9), st.integers(2, 30), st.integers(1, 12), st.integers(1, 40))
def test_cells_hold_all_choices_and_fit(n_layers: int, n_experts: int, rows: int, columns: int) -> None:
    """Guards: the last, smaller groups left out or averaged as if they were full."""
    activity = activity_of(observation(tokens(5, n_layers, n_experts, 1), n_layers, n_experts))
    grid = grid_of(activity, rows, columns)
    assert len(grid.rows) <= rows
    assert grid.n_columns <= columns
    total = 0.0
    for number, row in enumerate(grid.rows):
        layers = min(grid.layers_per_row, n_layers - number * grid.layers_per_row)
        for column, value in enumerate(row):
            assert value is not None
            experts = min(grid.experts_per_column, n_experts - column * grid.experts_per_column)
            total += value * 5 * layers * experts
    assert total == pytest.approx(5 * n_layers)


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1))
def test_more_is_never_a_lighter_shade(high: float, ratio: float, first: float, second: float) -> None:
    """Guards: a scale that turns round, or does not put the even load in the middle."""
    scale = Scale(high, high * ratio)
    low, great = sorted((first * high, second * high))
    assert 0 <= scale.level(low, 10) <= scale.level(great, 10) <= 9
    assert scale.value(0) == 0
    assert scale.value(1) == pytest.approx(high)
    if 0.01 <= ratio <= 0.98:
        assert scale.value(0.5) == pytest.approx(scale.even)


def test_one_scale_for_several_pictures() -> None:
    """Guards: two pictures side by side whose shades mean different shares."""
    some, more = (activity_of(observation(tokens(n, seed=n))) for n in (5, 50))
    scale = scale_of([some, more], [grid_of(some, 99, 99), grid_of(more, 99, 99)])
    assert scale.high == max(max(layer.shares) for each in (some, more) for layer in each.layers)
    assert scale.even == pytest.approx(2 / 8)
    assert scale_of([Activity()], []).level(0.5, 10) == 0


def test_differences_are_of_shares() -> None:
    """Guards: a longer text that seems to use every expert more."""
    some = activity_of(observation(tokens(20)))
    again = some + some
    assert mean_overlap(some, again) == pytest.approx(1)
    assert all(each.first == each.second for each in differences(some, again, 5))
    changed = replace(some.layers[1], counts=(20, 20, 0, 0, 0, 0, 0, 0))
    other = Activity((some.layers[0], changed, some.layers[2]))
    first = differences(some, other, 1)[0]
    gaps = [a - b for a, b in zip(changed.shares, some.layers[1].shares, strict=True)]
    assert first.layer == 2
    assert abs(gaps[first.expert]) == max(map(abs, gaps))
    assert first.second - first.first == gaps[first.expert]
    nothing = replace(changed, counts=(0, 0, 0, 0, 0, 0, 20, 20))
    assert overlap(changed, nothing) == 0
    assert math.isclose(overlap(changed, changed), 1)
