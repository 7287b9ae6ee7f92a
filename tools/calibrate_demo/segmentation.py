"""Assign FFN neurons to experts of equal size: the cheapest assignment, and balanced clustering.

Works on matrices of costs and features, which `calibrate` computes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def assign(costs: Tensor, capacities: Tensor) -> Tensor:
    """Return the cheapest assignment of items to bins that fills every bin exactly.

    `costs` (items, bins), `capacities` (bins,): integers with the number of items as their sum. Returns the
    bin of each item (items,). The result is exact: all items start in their cheapest bin, then items move
    along shortest paths from bins with too many to bins with too few. A step between two bins costs as much
    as its cheapest item.
    """
    n_items, n_bins = costs.shape
    if int(capacities.sum()) != n_items:
        raise ValueError(f"capacities sum to {int(capacities.sum())}, not to {n_items} items")
    costs = costs.double()
    bins = costs.argmin(1)
    surplus = torch.bincount(bins, minlength=n_bins) - capacities
    own = costs.gather(1, bins[:, None])
    moves = costs - own
    steps, movers = _cheapest_moves(moves, bins, range(n_bins))
    while bool((surplus > 0).any()):
        path = _shortest_path(steps, surplus)
        items = [int(movers[first, second]) for first, second in pairwise(path)]
        for item, target in zip(items, path[1:], strict=True):
            bins[item] = target
            moves[item] = costs[item] - costs[item, target]
        surplus[path[0]] -= 1
        surplus[path[-1]] += 1
        rows, best = _cheapest_moves(moves, bins, path)
        steps[path], movers[path] = rows[path], best[path]
    return bins


def _cheapest_moves(moves: Tensor, bins: Tensor, changed: range | list[int]) -> tuple[Tensor, Tensor]:
    """Return, from each changed bin to each other bin, the least cost of moving an item, and the item."""
    n_bins = moves.shape[1]
    steps = torch.full((n_bins, n_bins), torch.inf, dtype=moves.dtype)
    movers = torch.zeros((n_bins, n_bins), dtype=torch.long)
    for number in changed:
        members = torch.nonzero(bins == number).flatten()
        if len(members):
            least, index = moves[members].min(0)
            steps[number], movers[number] = least, members[index]
        steps[number, number] = torch.inf
    return steps, movers


def _shortest_path(steps: Tensor, surplus: Tensor) -> list[int]:
    """Return the path from bins with a surplus to the nearest bin with room, by Bellman-Ford."""
    n_bins = len(surplus)
    distance = torch.where(surplus > 0, 0.0, torch.inf).to(steps.dtype)
    previous = torch.full((n_bins,), -1)
    for _ in range(n_bins):
        through = distance[:, None] + steps
        least, source = through.min(0)
        better = least < distance - 1e-12 * (1 + distance.abs().nan_to_num(posinf=0.0))
        if not bool(better.any()):
            break
        distance = torch.where(better, least, distance)
        previous = torch.where(better, source, previous)
    end = int(torch.where(surplus < 0, distance, torch.inf).argmin())
    path = [end]
    while previous[path[-1]] >= 0:
        path.append(int(previous[path[-1]]))
    return path[::-1]


def cluster(features: Tensor, n_clusters: int, *, n_rounds: int, generator: torch.Generator) -> Tensor:
    """Balanced k-means: return the cluster of each row of `features` (items, width), all of equal size."""
    n_items = len(features)
    size = torch.full((n_clusters,), n_items // n_clusters)
    centres = features[_spread(features, n_clusters, generator)]
    clusters = torch.full((n_items,), -1)
    for _ in range(n_rounds):
        found = assign(torch.cdist(features, centres).square(), size)
        if torch.equal(found, clusters):
            break
        clusters = found
        centres = torch.stack([features[clusters == number].mean(0) for number in range(n_clusters)])
    return clusters


def _spread(features: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeding: sample each next centre in proportion to its squared distance from the others."""
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    distance = torch.full((len(features),), torch.inf)
    while len(chosen) < n_clusters:
        distance = torch.minimum(distance, (features - features[chosen[-1]]).square().sum(1))
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return torch.tensor(chosen)
