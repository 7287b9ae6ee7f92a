"""How fast the types are on the 16B shape with a few layers: the part `speed` of benchmarks/quality.py.

Types are loaded and timed in turn, in an order that turns around every round. Files have random weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.support.quality_rows import SpeedRow
from benchmarks.support.quality_types import OURS, TIMED, Variant
from benchmarks.support.random_models import Shape, measure_speed, model_file, shape_of, with_layers
from benchmarks.support.rows import say
from benchmarks.support.sizes import size_of
from dsmoe_local.evaluate.speed.machine import cpu_name
from dsmoe_local.evaluate.speed.workload import workloads_of
from dsmoe_quantize import kernels

PRESET = "deepseekmoe-16b"


@dataclass(frozen=True, slots=True)
class Timing:
    """How much is timed."""

    layers: int
    n_prompt: int
    n_gen: int
    rounds: int
    threads: int
    quick: bool = False

    @property
    def shape(self) -> Shape:
        """Whose speed it is."""
        return shape_of(PRESET, quick=self.quick)

    def settings(self) -> dict[str, Any]:
        """What decides the figures, beside the types and the machine."""
        return {
            "shape": self.shape.name,
            "layers": self.layers,
            "n_prompt": self.n_prompt,
            "n_gen": self.n_gen,
            "rounds": self.rounds,
            "threads": self.threads,
            "kernels": kernels.version(),
        }

    def facts(self) -> dict[str, Any]:
        """The machine, as it is before."""
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        return {"cpu": cpu_name(), "load_before": load}


def timed_variants() -> Iterator[Variant]:
    """Each kind of file once: a recipe may be a stock type by another name. All without an importance matrix:
    with one, some stock mixes get larger types in a few tensors, and recipes never.
    """
    seen = set()
    for word in (*TIMED, *OURS):
        variant = Variant(word, False)
        if variant.digest not in seen:
            seen.add(variant.digest)
            yield variant


def measure_speeds(timing: Timing) -> list[SpeedRow]:
    """A row of each type."""
    files = {variant: model_file(timing.shape, timing.layers, variant.word) for variant in timed_variants()}
    workloads = workloads_of([timing.n_prompt], [timing.n_gen])
    rates: dict[Variant, list[Sequence[float]]] = {variant: [] for variant in files}
    for number in range(timing.rounds):
        for variant in list(files)[:: -1 if number % 2 else 1]:
            found = measure_speed(files[variant], workloads, 1, timing.threads)
            rates[variant].append([speed.rate for speed in found.speeds])
            told = ", ".join(f"{speed.workload.label} {speed.rate:.2f}" for speed in found.speeds)
            say(f"  round {number + 1}: {variant} {told}")
    hp = with_layers(timing.shape.hp, timing.layers)
    return [
        SpeedRow(
            variant.word,
            variant.imatrix,
            variant.digest,
            size_of(hp, variant.word).n_bytes_per_token,
            [round(prompt, 3) for prompt, _ in each],
            [round(decode, 3) for _, decode in each],
        )
        for variant, each in rates.items()
    ]
