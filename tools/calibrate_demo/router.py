"""Train a linear router that drops the experts whose omission causes the least damage.

llama.cpp's graph chooses the experts with the largest logits. For training, the choice is random: a set of
experts is dropped with a probability proportional to exp(-sum of its logits). Then the expected damage,
summed exactly over all sets, is a smooth function of the router. Training starts from the ridge regression
from the FFN input to each expert's output norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DropSets:
    """All ways to drop `n_dropped` of `n_experts` experts.

    `members` (sets, experts) is 1 where a set holds an expert; `weights` (pairs, sets) turns the packed upper
    triangle of a Gram matrix of expert outputs into the squared norm of each set's sum.
    """

    members: Tensor
    weights: Tensor

    @classmethod
    def of(cls, n_experts: int, n_dropped: int) -> DropSets:
        """Return the table for these counts."""
        sets = list(combinations(range(n_experts), n_dropped))
        members = torch.zeros(len(sets), n_experts)
        for row, chosen in enumerate(sets):
            members[row, list(chosen)] = 1
        first, second = torch.triu_indices(n_experts, n_experts)
        both = members[:, first] * members[:, second]
        return cls(members, (both * torch.where(first == second, 1.0, 2.0)).T.contiguous())

    def expected_damage(self, logits: Tensor, gram: Tensor) -> Tensor:
        """Return the mean expected damage for logits (tokens, experts) and a packed Gram (tokens, pairs)."""
        probabilities = torch.softmax(-logits @ self.members.T, dim=-1)
        return (probabilities * (gram @ self.weights)).sum(-1).mean()

    def hard_damage(self, logits: Tensor, gram: Tensor) -> Tensor:
        """Return the damage (tokens,) if the smallest logits are dropped, as in inference."""
        dropped = (-logits @ self.members.T).argmax(1, keepdim=True)
        return (gram @ self.weights).gather(1, dropped).squeeze(1)


def ridge(inputs: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Return the linear map (outputs, inputs) of ridge regression.

    `penalty` is relative to the inputs' mean square.
    """
    gram = inputs.T @ inputs
    gram.diagonal().add_(penalty * float(gram.diagonal().mean()))
    solution: Tensor = torch.linalg.solve(gram.double(), (inputs.T @ targets).double())
    return solution.T.float()


def train(
    inputs: Tensor,
    gram: Tensor,
    start: Tensor,
    drop_sets: Sequence[DropSets],
    *,
    n_steps: int,
    learning_rate: float,
    generator: torch.Generator,
    batch: int = 2048,
) -> Tensor:
    """Train a router (experts, hidden_size) for the smallest expected damage, averaged over `drop_sets`.

    `inputs` (tokens, hidden_size), `gram` (tokens, pairs). Adam in whitened coordinates, cosine schedule.
    """
    covariance = (inputs.T @ inputs / len(inputs)).double()
    covariance.diagonal().add_(1e-3 * float(covariance.diagonal().mean()))
    factor = torch.linalg.cholesky(covariance).float()
    # inputs = white @ factor.T, so a map of `white` is the map of inputs times `factor`.
    white = torch.linalg.solve_triangular(factor, inputs.T, upper=False).T.contiguous()
    weight = (start @ factor).requires_grad_()
    scales = [float((gram @ sets.weights).mean()) for sets in drop_sets]
    optimizer = torch.optim.Adam([weight], lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    with torch.enable_grad():
        for _ in range(n_steps):
            index = torch.randint(len(inputs), (batch,), generator=generator)
            logits, chosen = white[index] @ weight.T, gram[index]
            loss = torch.stack(
                [
                    sets.expected_damage(logits, chosen) / scale
                    for sets, scale in zip(drop_sets, scales, strict=True)
                ]
            ).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    router: Tensor = torch.linalg.solve_triangular(factor.T, weight.detach().T, upper=True).T
    return router.contiguous()
