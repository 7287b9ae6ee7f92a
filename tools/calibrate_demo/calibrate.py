"""Make the packaged calibration: python -m tools.calibrate_demo.calibrate [--out FILE]

Takes half an hour on one core. Deterministic for a given version of torch and processor. For each MoE layer:

1. Estimate the Fisher information of the dense model's FFN output on the calibration text. It is the metric
   for errors of the output, called damage below.
2. Make the neurons with the largest mean contribution shared, and cluster the others by co-activation.
3. Fit a router (router.py): ridge regression, then training on the exact expected damage.
4. Move neurons, also shared ones, to the experts in which they cause the least damage when they are dropped.
   Train the router again. Repeat this for a few rounds, then train the router longer.

The held-out half of the text is not read here; benchmarks/demo_quality.py evaluates with it.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsmoe_convert.demo.calibration import (
    DATA,
    EXPERT_SIZE,
    N_ACTIVE,
    N_DENSE_LAYERS,
    N_ROUTED_EXPERTS,
    N_SHARED_EXPERTS,
    Calibration,
    save,
)
from dsmoe_convert.demo.source import open_source
from tools.calibrate_demo import corpus
from tools.calibrate_demo.dense import DenseModel, Layer, dense_ffn
from tools.calibrate_demo.router import DropSets, ridge, train
from tools.calibrate_demo.segmentation import assign, cluster

N_CLUSTER_TOKENS = 4096
N_ROUNDS = 4
ROUND_STRIDE = 2
"""Rounds use every second token; the last training uses all tokens."""

N_FEWER_ACTIVE = N_ACTIVE - 2
"""Routers are trained for the default and for this number, so that the demo also works with fewer experts."""

_SHARED = N_ROUTED_EXPERTS
"""The bin of the shared neurons, after those of the routed experts."""

_CAPACITIES = [EXPERT_SIZE] * N_ROUTED_EXPERTS + [EXPERT_SIZE * N_SHARED_EXPERTS]


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """An FFN's `inputs`, float16 (tokens, hidden_size); `fisher` of its output (hidden_size, hidden_size)."""

    inputs: Tensor
    fisher: Tensor


def collect(model: DenseModel, windows: Tensor) -> list[LayerStatistics]:
    """Run the dense model over the windows, forward and backward.

    The Fisher information needs gradients of the log-likelihood of labels that are sampled from the model.
    """
    hp = model.hyperparameters
    generator = torch.Generator().manual_seed(0)
    inputs: list[list[Tensor]] = [[] for _ in range(hp.n_layers)]
    fisher = torch.zeros(hp.n_layers, hp.hidden_size, hp.hidden_size)
    for number, window in enumerate(windows):
        outputs: list[Tensor] = []

        def ffn(index: int, layer: Layer, x: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
            inputs[index].append(x.detach().flatten(0, 1).half())
            output = dense_ffn(index, layer, x)
            if index == 0:
                # The graph starts here: weights need no gradient, and layer 0 stays dense.
                output = output.detach().requires_grad_()
            else:
                output.retain_grad()
            outputs.append(output)
            return output

        with torch.enable_grad():
            log_probabilities = model.logits(window[None], ffn)[0].log_softmax(-1)
            labels = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
            torch.autograd.backward(-log_probabilities.gather(1, labels).sum())
        for index, output in enumerate(outputs):
            gradient = output.grad
            assert gradient is not None
            fisher[index].addmm_(gradient[0].T, gradient[0])
        _say(f"statistics: window {number + 1} of {len(windows)}")
    return [
        LayerStatistics(torch.cat(rows), metric / windows.numel())
        for rows, metric in zip(inputs, fisher, strict=True)
    ]


class LayerCalibrator:
    """Finds a layer's experts and router. Bins 0 … 13 are routed experts, bin 14 the shared neurons."""

    def __init__(self, layer: Layer, statistics: LayerStatistics, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs = statistics.inputs.float()
        self.activations = layer.neurons(self.inputs)
        # (ffn_size, hidden_size): a neuron's contribution to the output, where damage is the squared norm.
        self.directions = layer.down.T @ metric_root(statistics.fisher)
        self.energy = self.directions.square().sum(1)
        self.two = DropSets.of(N_ROUTED_EXPERTS, N_ROUTED_EXPERTS - N_ACTIVE)
        self.four = DropSets.of(N_ROUTED_EXPERTS, N_ROUTED_EXPERTS - N_FEWER_ACTIVE)

    def run(self) -> tuple[Tensor, Tensor, float]:
        """Return bins (ffn_size,), router (experts, hidden_size), and damage relative to a random router."""
        few = slice(None, None, ROUND_STRIDE)
        bins = self.first_bins()
        router = self.first_router(bins)
        for _ in range(N_ROUNDS):
            router = self.train(bins, router, few, [self.two], 150)
            bins = self.move(router, few)
        everything = slice(None)
        router = self.train(bins, router, everything, [self.two, self.four], 300)
        return bins, router, self.damage(bins, router)

    def first_bins(self) -> Tensor:
        """Return the first bins: shared by mean contribution, routed experts by co-activation."""
        mean = self.activations.square().mean(0) * self.energy
        bins = torch.full((len(mean),), _SHARED)
        routed = mean.argsort(descending=True)[_CAPACITIES[_SHARED] :].sort().values
        tokens = torch.randperm(len(self.inputs), generator=self.generator)[:N_CLUSTER_TOKENS]
        features = self.activations[tokens][:, routed].abs() * self.energy[routed].sqrt()
        bins[routed] = cluster(features.T, N_ROUTED_EXPERTS, n_rounds=15, generator=self.generator)
        return bins

    def first_router(self, bins: Tensor) -> Tensor:
        """Fit a router by ridge regression from the FFN's input to each expert's output norm."""
        gram = self.gram(bins, slice(None, None, ROUND_STRIDE))
        inputs = self.inputs[::ROUND_STRIDE]
        router = ridge(inputs, gram[:, diagonal(N_ROUTED_EXPERTS)].sqrt(), 1e-3)
        return router / (inputs @ router.T).std(0).mean()

    def train(
        self, bins: Tensor, router: Tensor, tokens: slice, sets: list[DropSets], n_steps: int
    ) -> Tensor:
        """Fit the router to these experts."""
        return train(
            self.inputs[tokens],
            self.gram(bins, tokens),
            router,
            sets,
            n_steps=n_steps,
            learning_rate=0.02,
            generator=self.generator,
        )

    def move(self, router: Tensor, tokens: slice) -> Tensor:
        """Assign each neuron to the bin in which it causes the least damage when its expert is dropped."""
        logits = self.inputs[tokens] @ router.T
        dropped = sum(
            weight * dropped_experts(logits, N_ROUTED_EXPERTS - n_active)
            for n_active, weight in ((N_ACTIVE, 0.75), (N_FEWER_ACTIVE, 0.25))
        )
        costs = (self.activations[tokens].square() * self.energy).T @ dropped
        never_dropped = torch.zeros(len(costs), 1)
        return assign(torch.cat((costs, never_dropped), 1), torch.tensor(_CAPACITIES))

    def gram(self, bins: Tensor, tokens: slice) -> Tensor:
        """Return the inner products of the experts' outputs, (tokens, pairs), packed as upper triangles."""
        first, second = torch.triu_indices(N_ROUTED_EXPERTS, N_ROUTED_EXPERTS)
        members = [torch.nonzero(bins == expert).flatten() for expert in range(N_ROUTED_EXPERTS)]
        packed = []
        for part in torch.split(self.activations[tokens], 2048):
            outputs = torch.stack([part[:, neurons] @ self.directions[neurons] for neurons in members], 1)
            packed.append((outputs @ outputs.transpose(1, 2))[:, first, second])
        return torch.cat(packed)

    def damage(self, bins: Tensor, router: Tensor) -> float:
        """Return the damage by the experts that the router drops, relative to dropping random experts."""
        some = slice(None, None, 8)
        gram = self.gram(bins, some)
        kept = self.two.hard_damage(self.inputs[some] @ router.T, gram).mean()
        return float(kept / (gram @ self.two.weights).mean())


def metric_root(fisher: Tensor) -> Tensor:
    """Return R with R @ R.T = `fisher`, scaled to unit trace."""
    values, vectors = torch.linalg.eigh(fisher.double() / fisher.double().trace())
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root.float()


def diagonal(n_experts: int) -> Tensor:
    """Return the positions of the squared norms in a packed Gram matrix."""
    first, second = torch.triu_indices(n_experts, n_experts)
    return torch.nonzero(first == second).flatten()


def dropped_experts(logits: Tensor, n_dropped: int) -> Tensor:
    """Return 1 for the experts with the smallest logits, otherwise 0: (tokens, experts)."""
    return torch.zeros_like(logits).scatter_(1, logits.topk(n_dropped, largest=False).indices, 1.0)


def packed(bins: Tensor, router: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of the neurons (ffn_size,), shared first, and the router with logits of unit spread.

    The experts' mean is subtracted: it affects neither the softmax nor the order.
    """
    shared_first = (bins + 1) % (_SHARED + 1)
    order = torch.sort(shared_first, stable=True).indices
    centred = router - router.mean(0)
    return order, centred / (inputs.float() @ centred.T).std()


def calibrate(model: DenseModel, statistics: list[LayerStatistics]) -> Calibration:
    """Calibrate every layer that becomes a MoE layer."""
    orders, routers = [], []
    for number in range(N_DENSE_LAYERS, model.hyperparameters.n_layers):
        started = time.monotonic()
        bins, router, damage = LayerCalibrator(model.layers[number], statistics[number], number).run()
        order, router = packed(bins, router, statistics[number].inputs)
        orders.append(order.numpy().astype(np.uint16))
        routers.append(router.numpy().astype(np.float16))
        _say(f"layer {number}: damage {damage:.3f} of chance, {time.monotonic() - started:.0f} s")
    return Calibration(np.stack(orders), np.stack(routers))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main() -> None:
    """Calibrate and write the packaged file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA)
    options = parser.parse_args()
    # One thread: sums then have one order, and the result is the same on every run.
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    source = open_source()
    model = DenseModel.load(source)
    windows = corpus.token_windows(source, "calibration")
    save(calibrate(model, collect(model, torch.from_numpy(windows))), options.out)


if __name__ == "__main__":
    main()
