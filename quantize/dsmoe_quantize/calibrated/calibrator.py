"""Calibrates layer after layer: each is rounded on the hidden states that the rounded ones before it give.

The codes of a layer go to `layer_files`, and from there through the usual writer to the output.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsmoe_local.base import durable
from dsmoe_local.base.errors import InterruptedRunError, UsageError
from dsmoe_local.base.faults import reach
from dsmoe_local.base.progress import Advanced, Finished, Listener, Note, Started, ignore
from dsmoe_local.model.ggml import GgmlType
from dsmoe_local.model.layout import layer_of
from dsmoe_quantize.calibrated.blocks import FORMATS, Bytes, decode, encode
from dsmoe_quantize.calibrated.calibration import Calibration, Rounding
from dsmoe_quantize.calibrated.gptq import factor_of, gptq, grid_of
from dsmoe_quantize.calibrated.hessian import ENOUGH, Group, HessianTap
from dsmoe_quantize.calibrated.layer_files import LayerFiles, folder_of
from dsmoe_quantize.calibrated.learned import STEPS, Rounded, TrainedTensor, error, index_of, train
from dsmoe_quantize.calibrated.network.layer import Tap
from dsmoe_quantize.calibrated.network.network import Network, open_network
from dsmoe_quantize.imatrix import MIN_IMPORTANCE
from dsmoe_quantize.policy.choice import TensorChoice
from dsmoe_quantize.quantize import Plan, quantize_file
from dsmoe_quantize.write.output import Summary
from dsmoe_quantize.write.pipeline import n_cores

BATCH_TOKENS = 2048
"""Tokens that a layer computes at a time."""
_BATCH_WEIGHTS = 32 << 20
"""Elements of the Hessians of the experts that are rounded at a time."""
HELD_OUT = 0.1
"""Share of the sequences that judge learned rounding. They are not trained on."""
_N_RAREST = 3


def quantize_calibrated(
    plan: Plan,
    out: Path,
    calibration: Calibration,
    *,
    device: str = "auto",
    split_max_size: int | None = None,
    threads: int = 0,
    force: bool = False,
    listen: Listener = ignore,
    stop: threading.Event | None = None,
) -> Summary:
    """Calibrate the weights of all layers, then write the file like `quantize_file`.

    Finished layers are kept in a folder beside `out` until it is complete, so that the same call continues
    an interrupted run.

    Raises UsageError for a device that is not there, or if there is nothing to calibrate. Raises FormatError
    if the model computes NaN or infinities, and the errors of `quantize_file`.
    """
    started = time.monotonic()
    plan = replace(plan, calibration=calibration.record)
    place = device_of(device)
    torch.set_num_threads(threads or n_cores())
    layers = _layers(plan)
    if not any(layers):
        raise UsageError(
            "--calibrate has no effect: no matrix of a layer is quantized", remedy="leave it out"
        )
    shape = (*calibration.tokens.shape, plan.hp.hidden_size)
    fingerprint = {
        "the source": [part.identity for part in plan.file.parts],
        **plan.fingerprint,
        "the calibration": calibration.record,
        "the tokens": calibration.tokens_digest,
    }
    with durable.output_errors(out), durable.locked(folder_of(out.resolve())):
        folder = folder_of(out.resolve())
        learns = calibration.rounding is Rounding.LEARNED
        with LayerFiles(folder, layers, shape, fingerprint, listen, with_outputs=learns) as files:
            with open_network(plan.file, plan.hp) as network, torch.no_grad():
                _Run(network, layers, calibration, files, place, listen, stop or threading.Event()).run()
            summary = quantize_file(
                plan,
                out,
                encoded=files.rows(),
                split_max_size=split_max_size,
                threads=threads,
                force=force,
                listen=listen,
                stop=stop,
            )
        shutil.rmtree(folder)
    return replace(summary, seconds=time.monotonic() - started)


def device_of(word: str) -> torch.device:
    """Return the device called `word`; "auto" is a GPU if there is one. Raises UsageError without it."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if word == "auto":
        word = next(name for name, is_there in there.items() if is_there)
    if not there[word]:
        raise UsageError(
            f"torch finds no {word} device", remedy="--device cpu, or install torch for your GPU"
        )
    return torch.device(word)


def _layers(plan: Plan) -> list[list[TensorChoice]]:
    """Return the tensors of each layer that are encoded in a type whose codes can be chosen."""
    layers: list[list[TensorChoice]] = [[] for _ in range(plan.hp.n_layers)]
    for choice in plan.choices:
        layer = layer_of(choice.name)
        if layer is not None and layer < len(layers) and choice.changes and choice.type in FORMATS:
            layers[layer].append(choice)
    return layers


def _n_matrices(choice: TensorChoice) -> int:
    return choice.shape[0] if len(choice.shape) > 2 else 1


class _Run:
    """One run over the layers that are left."""

    def __init__(
        self,
        network: Network,
        layers: Sequence[Sequence[TensorChoice]],
        calibration: Calibration,
        files: LayerFiles,
        device: torch.device,
        listen: Listener,
        stop: threading.Event,
    ) -> None:
        self._network = network
        self._layers = layers
        self._calibration = calibration
        self._learns = calibration.rounding is Rounding.LEARNED
        self._files = files
        self._device = device
        self._listen = listen
        self._stop = stop
        n_sequences, n_tokens = calibration.tokens.shape
        self._n_together = max(1, BATCH_TOKENS // n_tokens)
        self._n_batches = -(-n_sequences // self._n_together)

    def run(self) -> None:
        """Calibrate the layers that are left. Raises InterruptedRunError; finished layers are kept."""
        steps = [
            2 * self._n_batches + sum(map(_n_matrices, layer)) + (2 * STEPS if self._learns and layer else 0)
            for layer in self._layers
        ]
        steps[-1] -= self._n_batches
        first = self._files.n_done
        self._listen(Started("calibrating", sum(steps), sum(steps[:first]), unit="steps"))
        if first == 0:
            tokens = torch.from_numpy(self._calibration.tokens).long()
            batches = tokens.split(self._n_together)
            self._files.save_states(0, (self._network.embed(batch) for batch in batches))
        for layer in range(first, len(self._layers)):
            self._calibrate(layer)
        self._listen(Finished("calibrating"))
        if note := rare_experts(self._files.reports):
            self._listen(Note(note))

    def _calibrate(self, layer: int) -> None:
        choices = {choice.name: choice for choice in self._layers[layer]}
        weights = self._network.weights(layer, self._device)
        rounded, few = self._round_all(layer, choices, weights)
        for name in choices.keys() - rounded.keys():
            raise RuntimeError(f"{name}: the forward pass does not report its inputs")
        if self._learns and rounded:
            encoded = self._learn(layer, weights, rounded)
        else:
            encoded = {name: each.rows for name, each in rounded.items()}
        del rounded
        if layer + 1 < len(self._layers):
            for name, rows in encoded.items():
                weights[name] = self._decoded(choices[name], rows)
            self._files.save_states(layer + 1, self._forward(layer, weights))
            reach("calibration.states")
        self._files.save(layer, encoded, {name: found for name, found in few.items() if found})

    def _round_all(
        self, layer: int, choices: Mapping[str, TensorChoice], weights: dict[str, torch.Tensor]
    ) -> tuple[dict[str, Rounded], dict[str, list[tuple[int, int]]]]:
        """Round the matrices of a layer, and remove them from `weights`. Return also experts with few tokens.

        If the layer learns, its outputs before rounding are kept.
        """
        tap = HessianTap({name: choice.shape for name, choice in choices.items()})
        outputs = self._forward(layer, weights, tap)
        if self._learns and choices:
            self._files.save_outputs(outputs)
            reach("calibration.outputs")
        else:
            deque(outputs, maxlen=0)
        rounded: dict[str, Rounded] = {}
        few: dict[str, list[tuple[int, int]]] = {}
        for group in tap.groups():
            few |= {name: _few(group, choices[name]) for name in group.tensors}
            rounded |= self._round(layer, group, choices, weights)
        return rounded, few

    def _decoded(self, choice: TensorChoice, rows: Bytes) -> torch.Tensor:
        decoded = decode(choice.type, rows, choice.shape[-1])
        return torch.from_numpy(decoded).view(choice.shape).to(self._device)

    def _forward(
        self, layer: int, weights: Mapping[str, torch.Tensor], tap: HessianTap | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield the hidden states after a layer, in batches."""
        for batch in self._files.states(layer).split(self._n_together):
            states = batch.to(self._device).float()
            yield self._network.forward(layer, weights, states, self._stoppable(tap))
            self._advance(1, layer)

    def _advance(self, amount: int, layer: int) -> None:
        self._listen(Advanced(amount, f"layer {layer}"))
        self._refuse_stop()

    def _stoppable(self, tap: Tap | None = None) -> Tap:
        """Return a tap that calls `tap`, and ends the forward pass when the run is stopped."""

        def observe(
            tensor: str,
            inputs: torch.Tensor,
            *,
            expert: int | None = None,
            gate: torch.Tensor | None = None,
        ) -> None:
            self._refuse_stop()
            if tap is not None:
                tap(tensor, inputs, expert=expert, gate=gate)

        return observe

    def _refuse_stop(self) -> None:
        if self._stop.is_set():
            n_done, n_layers = self._files.n_done, len(self._layers)
            raise InterruptedRunError(
                f"interrupted: {n_done} of {n_layers} layers calibrated",
                remedy="run the same command again to continue",
            )

    def _round(
        self,
        layer: int,
        group: Group,
        choices: Mapping[str, TensorChoice],
        weights: dict[str, torch.Tensor],
    ) -> dict[str, Rounded]:
        """Round the tensors of a group, several of their matrices at a time. Remove them from `weights`."""
        parts: dict[str, list[Rounded]] = {name: [] for name in group.tensors}
        together = max(1, _BATCH_WEIGHTS // group.hessian.shape[-1] ** 2)
        for first in range(0, len(group.hessian), together):
            hessian = group.hessian[first : first + together]
            is_nearest = self._calibration.rounding is Rounding.NEAREST
            factor = None if is_nearest else factor_of(hessian)
            for name in group.tensors:
                whole = weights[name] if weights[name].dim() > 2 else weights[name][None]
                matrices = whole[first : first + together]
                parts[name].append(self._rounded(choices[name].type, matrices, hessian, factor))
                self._advance(len(matrices), layer)
        rounded = {}
        for name in group.tensors:
            del weights[name]
            rounded[name] = _joined(parts.pop(name))
        return rounded

    def _rounded(
        self,
        kind: GgmlType,
        matrices: torch.Tensor,
        hessian: torch.Tensor,
        factor: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Rounded:
        rows = _encoded(kind, matrices, hessian)
        if factor is None:
            return Rounded(rows)
        form = FORMATS[kind]
        grid = grid_of(form, rows, matrices.shape, self._device)
        codes, positions = gptq(matrices, grid, *factor)
        form.write_codes(rows, codes.cpu().numpy())
        return Rounded(rows, index_of(grid.levels, positions) if self._learns else None)

    def _learn(
        self, layer: int, fixed: Mapping[str, torch.Tensor], rounded: Mapping[str, Rounded]
    ) -> dict[str, Bytes]:
        """Train scales, and then scales and codes, each from those of GPTQ on. Return the best of the three.

        The last sequences judge. Training takes the others in random order, several times. `fixed` are the
        weights that are not rounded.
        """
        choices = {choice.name: choice for choice in self._layers[layer]}
        states, outputs = self._files.states(layer), self._files.outputs()
        n_held = max(1, round(HELD_OUT * len(states)))
        n_training = max(1, len(states) - n_held)
        n_picks = STEPS * self._n_together
        forward = partial(self._network.forward, layer, tap=self._stoppable())

        def batch(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return states[places].to(self._device).float(), outputs[places].to(self._device)

        def judged(candidate: Mapping[str, Bytes]) -> float:
            weights = {name: self._decoded(choices[name], rows) for name, rows in candidate.items()}
            total = 0.0
            for places in torch.arange(len(states) - n_held, len(states)).split(self._n_together):
                given, wanted = batch(places)
                total += float(error(forward({**fixed, **weights}, given), wanted)) * len(places)
            return total

        best = {name: each.rows for name, each in rounded.items()}
        least = judged(best)
        for with_codes in (False, True):
            trained = {name: _trained(choices[name], each, with_codes) for name, each in rounded.items()}
            generator = torch.Generator().manual_seed(self._calibration.seed * len(self._layers) + layer)
            orders = [torch.randperm(n_training, generator=generator) for _ in range(0, n_picks, n_training)]
            picks = torch.cat(orders)[:n_picks].view(STEPS, -1)
            train(forward, fixed, trained, map(batch, picks), lambda: self._advance(1, layer))
            encoded = {name: _rows(each) for name, each in trained.items()}
            del trained
            if (found := judged(encoded)) < least:
                best, least = encoded, found
        self._files.remove_outputs()
        return best


def _trained(choice: TensorChoice, rounded: Rounded, with_codes: bool) -> TrainedTensor | list[TrainedTensor]:
    """Return a tensor to train: of routed experts, one for each of them."""
    form = FORMATS[choice.type]
    if not _is_routed(choice):
        return TrainedTensor(form, rounded, choice.shape, with_codes)
    assert rounded.indexes is not None
    matrices = zip(np.split(rounded.rows, _n_matrices(choice)), rounded.indexes, strict=True)
    return [TrainedTensor(form, Rounded(*matrix), choice.shape[1:], with_codes) for matrix in matrices]


def _rows(trained: TrainedTensor | Sequence[TrainedTensor]) -> Bytes:
    if isinstance(trained, TrainedTensor):
        return trained.rows()
    return np.concatenate([each.rows() for each in trained])


def _joined(parts: Sequence[Rounded]) -> Rounded:
    indexes = [part.indexes for part in parts if part.indexes is not None]
    return Rounded(np.concatenate([part.rows for part in parts]), torch.cat(indexes) if indexes else None)


def _encoded(kind: GgmlType, matrices: torch.Tensor, hessian: torch.Tensor) -> Bytes:
    """Encode matrices with ggml, by the importance that the diagonals of their Hessians give."""
    importance = hessian.diagonal(dim1=-2, dim2=-1)
    mean = importance.mean(-1, keepdim=True)
    importance = torch.where(mean > 0, importance.clamp(min=float(MIN_IMPORTANCE) * mean), 1)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        parts = threads.map(partial(encode, kind), matrices.cpu().numpy(), importance.cpu().numpy())
        return np.concatenate(list(parts))


def _is_routed(choice: TensorChoice) -> bool:
    return "_exps." in choice.name


def _few(group: Group, choice: TensorChoice) -> list[tuple[int, int]]:
    """Return the experts of a tensor with too few tokens, and how many these are."""
    if not _is_routed(choice):
        return []
    wanted = ENOUGH * choice.shape[-1]
    return [(expert, count) for expert, count in enumerate(group.counts.tolist()) if count < wanted]


def rare_experts(reports: Sequence[Any]) -> str:
    """Return a note about experts that saw too few tokens, from the reports of all layers; "" without any."""
    found = {
        (layer, expert): count
        for layer, report in enumerate(reports)
        for few in report.values()
        for expert, count in few
    }
    if not found:
        return ""
    rarest = sorted(found, key=lambda place: (found[place], place))[:_N_RAREST]
    named = ", ".join(f"layer {layer} expert {expert}: {found[layer, expert]:,}" for layer, expert in rarest)
    return (
        f"{len(found):,} experts saw fewer than {ENOUGH} tokens for each input column, and were blended with"
        f" the mean of their layer. Fewest tokens: {named}. More --calibration-tokens help"
    )
