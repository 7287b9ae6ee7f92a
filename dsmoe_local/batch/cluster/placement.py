"""Which nodes of a Ray cluster get workers, and what Ray reserves for each worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.batch.cluster.ray_connection import AUTO


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Where the cluster is, and what its workers get.

    `address` is LOCAL, AUTO or HOST:PORT. `n_workers` None: as many as have room. `n_cpus`, `n_gpus` and
    `memory` (bytes) are reserved for each worker; None: an equal part of the node, and no memory.
    `ship_model`: nodes without the model get a copy.
    """

    address: str = AUTO
    n_workers: int | None = None
    n_cpus: int | None = None
    n_gpus: int | None = None
    memory: int | None = None
    ship_model: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A node with its total resources."""

    id: str
    name: str
    n_cpus: int
    n_gpus: int = 0
    memory: int = 0


class Placement:
    """Decides where workers start. `limits`: how many a node can have, if less than have room."""

    def __init__(self, options: RayOptions) -> None:
        self.limits: dict[str, int] = {}
        self._options = options
        # Workers of a node with --ray-workers. It never changes, because Ray has reserved its part for each.
        self._n_each = 0

    def places(self, nodes: Sequence[Node], n_workers: Mapping[str, int]) -> Iterator[Node]:
        """Yield the node of each worker that has room, in order. `n_workers`: those that nodes have now."""
        n_usable = sum(node.n_cpus > 0 for node in nodes)
        if not self._n_each and n_usable:
            self._n_each = -(-(self._options.n_workers or 1) // n_usable)
        free = [
            (n, index)
            for index, node in enumerate(nodes)
            for n in range(n_workers.get(node.id, 0), self._room(node))
        ]
        # The nodes with the fewest workers come first.
        for _, index in sorted(free):
            yield nodes[index]

    def needs(self, node: Node) -> dict[str, int]:
        """Return what Ray reserves for a worker on a node."""
        options = self._options
        n_cpus = options.n_cpus or max(1, node.n_cpus // max(1, self._n_each))
        n_gpus = options.n_gpus
        if n_gpus is None:
            n_gpus = max(1, node.n_gpus // max(1, node.n_cpus // n_cpus)) if node.n_gpus else 0
        return {"num_cpus": n_cpus, "num_gpus": n_gpus, "memory": options.memory or 0}

    def expected(self, node: Node) -> int:
        """Return how many workers a node is likely to have, and so share its cores and its memory."""
        room = self._room(node)
        return max(1, room if self._options.n_workers is None else min(room, self._n_each))

    def _room(self, node: Node) -> int:
        has = {"num_cpus": node.n_cpus, "num_gpus": node.n_gpus, "memory": node.memory}
        room = min(has[name] // needed for name, needed in self.needs(node).items() if needed)
        return min(room, self.limits.get(node.id, room))


def node_of(found: Mapping[str, Any]) -> Node:
    """Return a node as `ray.nodes()` describes it."""
    resources = found["Resources"]
    name = f"{found['NodeManagerHostname']} ({found['NodeManagerAddress']}, node {found['NodeID'][:6]})"
    return Node(
        found["NodeID"],
        safe_line(name, 80),
        int(resources.get("CPU", 0)),
        int(resources.get("GPU", 0)),
        int(resources.get("memory", 0)),
    )


def no_room(nodes: Sequence[Node]) -> DsmoeError:
    """Return the error that no node has room for a worker."""
    largest = max(nodes, key=lambda node: (node.n_gpus, node.n_cpus), default=None)
    where = count(len(nodes), "node")
    if largest is not None:
        where += f"; {largest.name} has {_resources(largest.n_cpus, largest.n_gpus, largest.memory)}"
    return DsmoeError(
        "no node of the cluster has room for a worker",
        where=where,
        remedy="ask for less: -t (CPUs), --ray-gpus, --ray-memory",
    )


def waiting_note(n_waiting: int, needs: Mapping[str, int], available: Mapping[str, float]) -> str:
    """Return what to tell the user if workers wait for resources of their nodes."""
    free = (int(available.get(name, 0)) for name in ("CPU", "GPU", "memory"))
    return (
        f"{count(n_waiting, 'worker')} cannot start yet: one needs {_resources(*needs.values())};"
        f" other jobs leave {_resources(*free)} of the cluster"
    )


def _resources(n_cpus: int, n_gpus: int, memory: int) -> str:
    return ", ".join([count(n_cpus, "CPU"), count(n_gpus, "GPU"), *([format_size(memory)] if memory else [])])
