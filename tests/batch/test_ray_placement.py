"""Which nodes of a Ray cluster get workers, without Ray."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from dsmoe_local.batch.cluster.placement import Node, Placement, RayOptions, waiting_note


def placed(placement: Placement, nodes: list[Node], has: Counter[str], n_most: int = 99) -> Counter[str]:
    """Return the new workers of each node."""
    return Counter(node.id for node in itertools.islice(placement.places(nodes, has), n_most))


@pytest.mark.parametrize(
    ("options", "node", "n_workers", "needs"),
    [
        (RayOptions(), Node("a", "a", 8), 1, (8, 0, 0)),
        (RayOptions(), Node("a", "a", 8, 2), 1, (8, 2, 0)),
        (RayOptions(n_cpus=2), Node("a", "a", 8, 8), 4, (2, 2, 0)),
        (RayOptions(n_cpus=8), Node("a", "a", 64, 4), 4, (8, 1, 0)),
        (RayOptions(n_cpus=8, n_gpus=0), Node("a", "a", 64, 4), 8, (8, 0, 0)),
        (RayOptions(n_cpus=1, memory=3), Node("a", "a", 8, 0, 7), 2, (1, 0, 3)),
        (RayOptions(n_workers=4), Node("a", "a", 8), 4, (2, 0, 0)),
        (RayOptions(n_workers=2, n_cpus=1), Node("a", "a", 8), 2, (1, 0, 0)),
        (RayOptions(), Node("a", "a", 0), 0, (1, 0, 0)),
    ],
)
def test_what_a_node_gives(options: RayOptions, node: Node, n_workers: int, needs: tuple[int, ...]) -> None:
    """Guards: GPUs that no worker uses because there are more workers than GPUs; workers that do not know how
    many share their node.
    """
    placement = Placement(options)
    assert placed(placement, [node], Counter(), options.n_workers or 99).total() == n_workers
    assert placement.expected(node) == max(1, n_workers)
    assert tuple(placement.needs(node).values()) == needs


def test_a_lost_node_and_its_replacement() -> None:
    """Guards: workers that wait for ever on a node that is full, and a new node that stays idle."""
    a, b, c = (Node(name, name, 8) for name in "abc")
    placement = Placement(RayOptions(n_workers=4))
    has = placed(placement, [Node("head", "head", 0), a, b], Counter(), 4)
    assert has == {"a": 2, "b": 2}
    del has["b"]
    assert placed(placement, [a], has, 2) == {}
    assert placed(placement, [a, c], has, 2) == {"c": 2}


def test_what_the_user_is_told_about_a_busy_cluster() -> None:
    """Guards: a note that does not say what is missing."""
    needs = Placement(RayOptions()).needs(Node("a", "a", 8, 1))
    assert waiting_note(2, needs, {"CPU": 3.0}) == (
        "2 workers cannot start yet: one needs 8 CPUs, 1 GPU; other jobs leave 3 CPUs, 0 GPUs of the cluster"
    )
