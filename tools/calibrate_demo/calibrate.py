"""Makes the packaged calibration: python -m tools.calibrate_demo.calibrate [--out FILE]

Needs torch. Half an hour on one core; deterministic for a given torch and processor. Per MoE layer:

1. What would an error in the FFN's output cost? The Fisher information of the dense model, estimated on the
   calibration text, is the metric in which outputs are measured from here on.
2. The neurons with the largest mean contribution are shared; the others are clustered by co-activation.
3. A router is fitted (router.py): ridge regression, then training on the exact expected damage.
4. Neurons move to the experts in which being dropped costs least, the shared ones included; the router
   follows; a few rounds, and a last, longer training.

The held-out half of the text is never read here; benchmarks/demo_quality.py judges by it.
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

from dsmoe_convert.demo import corpus
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
from tools.calibrate_demo.dense import DenseModel, Layer, dense_ffn
from tools.calibrate_demo.router import DropSets, ridge, train
from tools.calibrate_demo.segmentation import assign, cluster

N_CLUSTER_TOKENS = 4096
N_ROUNDS = 4
ROUND_STRIDE = 2
"""Rounds look at every second token; the last training at all of them."""

N_FEWER_ACTIVE = N_ACTIVE - 2
"""Routers are trained for the default and for this, so that fewer active experts stay useful."""

_SHARED = N_ROUTED_EXPERTS
"""The bin of the shared neurons: it comes after the routed experts'."""

_CAPACITIES = [EXPERT_SIZE] * N_ROUTED_EXPERTS + [EXPERT_SIZE * N_SHARED_EXPERTS]


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """`inputs` (tokens, hidden_size) float16 of an FFN; `fisher` (hidden_size, hidden_size) of its output."""

    inputs: Tensor
    fisher: Tensor


def collect(model: DenseModel, windows: Tensor) -> list[LayerStatistics]:
    """Run the dense model over the windows, forward and backward.

    The Fisher information needs gradients of the log-likelihood of labels drawn from the model itself.
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
                # The graph starts here: weights need no gradient, layer 0 stays dense.
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
    """Finds one layer's experts and router. Bins 0 … 13 are routed experts, bin 14 the shared neurons."""

    def __init__(self, layer: Layer, statistics: LayerStatistics, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs = statistics.inputs.float()
        self.activations = layer.neurons(self.inputs)
        # (ffn_size, hidden_size): what a neuron adds to the output, in coordinates where damage is length.
        self.directions = layer.down.T @ metric_root(statistics.fisher)
        self.energy = self.directions.square().sum(1)
        self.two = DropSets.of(N_ROUTED_EXPERTS, N_ROUTED_EXPERTS - N_ACTIVE)
        self.four = DropSets.of(N_ROUTED_EXPERTS, N_ROUTED_EXPERTS - N_FEWER_ACTIVE)

    def run(self) -> tuple[Tensor, Tensor, float]:
        """Bins (ffn_size,), router (experts, hidden_size) and the damage that is left, relative to chance."""
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
        """Mean contribution decides who is shared, co-activation who goes with whom."""
        mean = self.activations.square().mean(0) * self.energy
        bins = torch.full((len(mean),), _SHARED)
        routed = mean.argsort(descending=True)[_CAPACITIES[_SHARED] :].sort().values
        tokens = torch.randperm(len(self.inputs), generator=self.generator)[:N_CLUSTER_TOKENS]
        features = self.activations[tokens][:, routed].abs() * self.energy[routed].sqrt()
        bins[routed] = cluster(features.T, N_ROUTED_EXPERTS, n_rounds=15, generator=self.generator)
        return bins

    def first_router(self, bins: Tensor) -> Tensor:
        """Ridge regression from the FFN's input to each expert's output norm, scaled to unit spread."""
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
        """Put every neuron where it is missed least: it costs its energy whenever its expert is dropped."""
        logits = self.inputs[tokens] @ router.T
        dropped = sum(
            weight * dropped_experts(logits, N_ROUTED_EXPERTS - n_active)
            for n_active, weight in ((N_ACTIVE, 0.75), (N_FEWER_ACTIVE, 0.25))
        )
        costs = (self.activations[tokens].square() * self.energy).T @ dropped
        never_dropped = torch.zeros(len(costs), 1)
        return assign(torch.cat((costs, never_dropped), 1), torch.tensor(_CAPACITIES))

    def gram(self, bins: Tensor, tokens: slice) -> Tensor:
        """Inner products of the experts' outputs, (tokens, pairs), packed as upper triangles."""
        first, second = torch.triu_indices(N_ROUTED_EXPERTS, N_ROUTED_EXPERTS)
        members = [torch.nonzero(bins == expert).flatten() for expert in range(N_ROUTED_EXPERTS)]
        packed = []
        for part in torch.split(self.activations[tokens], 2048):
            outputs = torch.stack([part[:, neurons] @ self.directions[neurons] for neurons in members], 1)
            packed.append((outputs @ outputs.transpose(1, 2))[:, first, second])
        return torch.cat(packed)

    def damage(self, bins: Tensor, router: Tensor) -> float:
        """Damage by the experts that the router leaves out, relative to leaving out any."""
        some = slice(None, None, 8)
        gram = self.gram(bins, some)
        kept = self.two.hard_damage(self.inputs[some] @ router.T, gram).mean()
        return float(kept / (gram @ self.two.weights).mean())


def metric_root(fisher: Tensor) -> Tensor:
    """R with R @ R.T = `fisher`, scaled to unit trace."""
    values, vectors = torch.linalg.eigh(fisher.double() / fisher.double().trace())
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root.float()


def diagonal(n_experts: int) -> Tensor:
    """Positions of the squared norms in a packed Gram matrix."""
    first, second = torch.triu_indices(n_experts, n_experts)
    return torch.nonzero(first == second).flatten()


def dropped_experts(logits: Tensor, n_dropped: int) -> Tensor:
    """1 for the experts with the least logits, else 0: (tokens, experts)."""
    return torch.zeros_like(logits).scatter_(1, logits.topk(n_dropped, largest=False).indices, 1.0)


def packed(bins: Tensor, router: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the neurons (ffn_size,), shared first, and the router with logits of unit spread.

    A common addend changes neither the softmax nor the order, so the experts' mean is taken out.
    """
    shared_first = (bins + 1) % (_SHARED + 1)
    order = torch.sort(shared_first, stable=True).indices
    centred = router - router.mean(0)
    return order, centred / (inputs.float() @ centred.T).std()


def calibrate(model: DenseModel, statistics: list[LayerStatistics]) -> Calibration:
    """Segment every layer that becomes a MoE layer."""
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
