"""What errors cost: measured figures as they are, built-in ones on their scale."""

from __future__ import annotations

import math

import pytest

from dsmoe_quantize.budget.error_weights import WEIGHTS, error_weights
from dsmoe_quantize.policy.recipes import Group

OUTPUT, EMBEDDING = Group("output", None), Group("embedding", None)
DOWN = [Group("routed-down", layer) for layer in (1, 2, 3)]
VALUE = [Group("attention-value", layer) for layer in range(4)]
GROUPS = [EMBEDDING, OUTPUT, *VALUE, *DOWN]


def test_nothing_is_known() -> None:
    """Guards: built-in costs of a kind in each of its layers."""
    found = error_weights(GROUPS, {})
    assert str(found) == "built in"
    for kind in ("embedding", "output", "attention-value", "routed-down"):
        total = sum(cost for group, cost in found.of.items() if group.kind == kind)
        assert total == pytest.approx(WEIGHTS[kind])


def test_some_kinds_are_known() -> None:
    """Guards: costs of two models beside each other, whose ratio is that of the models, not of the groups."""
    known = {"output": 10 * WEIGHTS["output"], "routed-down": 1000 * WEIGHTS["routed-down"]}
    found = error_weights(GROUPS, known)
    assert str(found) == "measured for 2 of 4 kinds"
    assert found.of[OUTPUT] == known["output"]
    assert [found.of[group] for group in DOWN] == pytest.approx([known["routed-down"] / 3] * 3)
    assert found.of[EMBEDDING] == pytest.approx(100 * WEIGHTS["embedding"])
    assert [found.of[group] for group in VALUE] == pytest.approx([25 * WEIGHTS["attention-value"]] * 4)


def test_layers_are_known() -> None:
    """Guards: a layer's own cost that its kind's outweighs; the scale of a kind from half of its layers."""
    layers = {str(group): cost for group, cost in zip(DOWN, (1.0, 2.0, 5.0), strict=True)}
    found = error_weights(GROUPS, layers)
    assert [found.of[group] for group in DOWN] == [1.0, 2.0, 5.0]
    assert str(found) == "measured for 1 of 4 kinds"
    assert found.of[OUTPUT] == pytest.approx(WEIGHTS["output"] * 8 / WEIGHTS["routed-down"])
    both = error_weights(GROUPS, {"routed-down.2": 2.0, "routed-down": 24.0})
    assert [both.of[group] for group in DOWN] == [8.0, 2.0, 8.0]
    assert both.of[OUTPUT] == pytest.approx(WEIGHTS["output"] * 18 / WEIGHTS["routed-down"])
    one = error_weights(GROUPS, {"routed-down.2": 2.0})
    assert str(one) == "measured for single layers"
    assert one.of[OUTPUT] == WEIGHTS["output"]
    built_in = WEIGHTS["routed-down"] / 3
    assert [one.of[group] for group in DOWN] == pytest.approx([built_in, 2.0, built_in], rel=1e-9)


def test_all_is_known() -> None:
    """Guards: "measured" said of less; a cost of nothing that makes all others nothing, or an error."""
    known = {"output": 0.0, "embedding": 2.0, "routed-down": 3.0, "attention-value": 4.0}
    assert str(error_weights(GROUPS, known)) == "measured"
    del known["attention-value"]
    found = error_weights(GROUPS, known)
    scale = math.sqrt(2 / WEIGHTS["embedding"] * 3 / WEIGHTS["routed-down"])
    assert found.of[VALUE[0]] == pytest.approx(scale * WEIGHTS["attention-value"] / 4)
    assert found.of[OUTPUT] == 0
    nothing = error_weights(GROUPS, {"output": 0.0})
    assert nothing.of[EMBEDDING] == WEIGHTS["embedding"]


def test_of_another_model() -> None:
    """Guards: groups that this model has not, counted as measured."""
    assert str(error_weights(GROUPS, {"shared-down": 3.0, "routed-down.99": 1.0})) == "built in"
