"""How fast the types are on the 16B shape with a few layers: the part `speed` of benchmarks/quality.py.

Each type is loaded together with the base, and both are timed in turn, a few seconds each: whatever else the
machine does, both feel. Every round loads them anew, since memory is not as fast in every place. Files have
random weights.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.quality_rows import SpeedRow
from benchmarks.support.quality_types import BASE, OURS, TIMED, Variant
from benchmarks.support.random_models import Shape, model_file, shape_of, with_layers
from benchmarks.support.rows import say
from benchmarks.support.sizes import size_of
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.machine import cpu_name
from dsmoe_local.evaluate.speed.timing import Timer, options_for
from dsmoe_local.evaluate.speed.workload import Workload, workloads_of
from dsmoe_quantize.policy.types import TypeChoice
from dsmoe_quantize.write import kernels

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
        timers = [
            Timer(stack.enter_context(EngineClient.load(_options(each, workloads, threads))))
            for each in ((base, path) if base_first else (path, base))
        ]
        if base_first:
            timers.reverse()
        for timer in timers:
            for workload in workloads:
                timer.time(workload)  # does not count
        seconds = [
            [
                _one_turn(timers, workload, turn)
                for turn in range(turns * (REPLY_TURNS if workload.n_gen else 1))
            ]
            for workload in workloads
        ]
    return Pair(
        [
            workload.n_tokens / statistics.median(mine for mine, _ in each)
            for workload, each in zip(workloads, seconds, strict=True)
        ],
        [statistics.median(theirs / mine for mine, theirs in each) for each in seconds],
    )


def _one_turn(timers: Sequence[Timer], workload: Workload, turn: int) -> tuple[float, float]:
    """Seconds of the model and of the base, who goes first by turns."""
    mine, theirs = timers
    if turn % 2:
        after = theirs.time(workload)
        return mine.time(workload), after
    return mine.time(workload), theirs.time(workload)


def _options(path: Path, workloads: Sequence[Workload], threads: int) -> ModelOptions:
    return options_for(ModelOptions(path, n_threads=threads), workloads)
