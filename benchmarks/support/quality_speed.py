"""How fast the types are on the 16B shape with a few layers: the part `speed` of benchmarks/quality.py.

Each type is loaded together with the base, and both are timed in turn, a few seconds each: whatever else the
machine does, both feel. Every round loads them anew, since memory is not as fast in every place. Files have
random weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.support.quality_rows import SpeedRow
from benchmarks.support.quality_types import BASE, OURS, TIMED, Variant
from benchmarks.support.random_models import Shape, model_file, shape_of, with_layers
from benchmarks.support.runner import Row, compare, in_turn, say
from benchmarks.support.sizes import size_of
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.machine import cpu_name
from dsmoe_local.evaluate.speed.timing import Timer, options_for
from dsmoe_local.evaluate.speed.workload import Workload, workloads_of
from dsmoe_quantize import kernels
from dsmoe_quantize.types import TypeChoice

PRESET = "deepseekmoe-16b"
REPLY_TURNS = 3
"""Replies are timed so many times as often as prompts: they are shorter, and types differ less in them."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How much is timed."""

    layers: int
    n_prompt: int
    n_gen: int
    rounds: int
    turns: int
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
            "turns": [self.turns, self.turns * REPLY_TURNS],
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
    timed = {variant.word: variant for variant in timed_variants()}
    rounds = time_beside_base(timing, {word: word for word in timed})
    hp = with_layers(timing.shape.hp, timing.layers)
    return [
        SpeedRow(
            variant.word,
            variant.imatrix,
            variant.digest,
            size_of(hp, word).n_bytes_per_token,
            *_rounds(rounds[word]),
        )
        for word, variant in timed.items()
    ]


def time_beside_base(timing: Timing, choices: Mapping[str, str | TypeChoice]) -> Mapping[str, Sequence[Pair]]:
    """Each type beside the base, round by round, under the same name."""
    files = {name: model_file(timing.shape, timing.layers, choice) for name, choice in choices.items()}
    base = model_file(timing.shape, timing.layers, BASE)
    workloads = workloads_of([timing.n_prompt], [timing.n_gen])
    pairs: dict[str, list[Pair]] = {name: [] for name in files}
    for number in range(timing.rounds):
        for name in list(files)[:: -1 if number % 2 else 1]:
            pair = time_pair(
                files[name], base, workloads, timing.turns, timing.threads, base_first=number % 2 == 1
            )
            pairs[name].append(pair)
            told = ", ".join(
                f"{workload.label} {rate:.2f} ({ratio:.3f} x {BASE})"
                for workload, rate, ratio in zip(workloads, pair.rates, pair.ratios, strict=True)
            )
            say(f"  round {number + 1}: {name} {told}")
    return pairs


def _rounds(pairs: Sequence[Pair]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Rates of prompts and of decoding, then their ratios, as rows have them."""
    return (
        [round(pair.rates[0], 3) for pair in pairs],
        [round(pair.rates[1], 3) for pair in pairs],
        *ratios_of(pairs),
    )


def ratios_of(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """To the base, of prompts and of decoding, round by round."""
    return [round(pair.ratios[0], 4) for pair in pairs], [round(pair.ratios[1], 4) for pair in pairs]


@dataclass(frozen=True, slots=True)
class Pair:
    """A model beside the base, by workload: its tokens per second, and their ratio to the base's in the same
    turn. Medians over the turns.
    """

    rates: Sequence[float]
    ratios: Sequence[float]


def time_pair(
    path: Path,
    base: Path,
    workloads: Sequence[Workload],
    turns: int,
    threads: int,
    *,
    base_first: bool = False,
) -> Pair:
    """Load both, time them in turn, give them back. Memory that is taken first may be the faster one:
    `base_first` changes who loads first.
    """
    with ExitStack() as stack:
        timers = {
            name: Timer(stack.enter_context(EngineClient.load(_options(each, workloads, threads))))
            for name, each in ((("base", base), ("model", path))[:: 1 if base_first else -1])
        }
        rows = [
            _compared(timers, workload, turns * (REPLY_TURNS if workload.n_gen else 1))
            for workload in workloads
        ]
    return Pair([row.ours for row in rows], [row.result for row in rows])


def _compared(timers: Mapping[str, Timer], workload: Workload, turns: int) -> Row:
    """Tokens per second of the model and of the base."""

    def rate(name: str, _: int) -> float:
        return workload.n_tokens / timers[name].time(workload)

    rates = in_turn({name: partial(rate, name) for name in ("base", "model")}, turns, told=None)
    return compare(workload.label, rates, "model", "base")


def _options(path: Path, workloads: Sequence[Workload], threads: int) -> ModelOptions:
    return options_for(ModelOptions(path, n_threads=threads), workloads)
