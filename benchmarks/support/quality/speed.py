"""The speed of the types on the 16B shape with a few layers: the part `speed` of benchmarks/quality.py.

Each type is loaded together with the base, and both are timed in turn, a few seconds each, so that other load
on the machine affects both. Every round loads them anew, because memory is not equally fast everywhere. The
weights are random.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.support.quality.figures import SpeedRow
from benchmarks.support.quality.variants import BASE, timed_variants
from benchmarks.support.random_models import model_file, shape_of, with_layers
from benchmarks.support.runner import Row, compare, in_turn
from benchmarks.support.sizes import size_of
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.machine import cpu_name
from dsmoe_local.evaluate.speed.timing import Timer, Workload, options_for, workloads_of
from dsmoe_quantize.policy.types import TypeChoice
from dsmoe_quantize.write import kernels

PRESET = "deepseekmoe-16b"
REPLY_TURNS = 3
"""Replies are timed this many times as often as prompts: they are shorter, and types differ less in them."""

Pair: TypeAlias = tuple[Row, Row]
"""A model beside the base: a prompt and a reply, medians over the turns."""


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

    def settings(self) -> dict[str, Any]:
        """Return what determines the figures, apart from the types and the machine."""
        return {
            "shape": shape_of(PRESET, quick=self.quick).name,
            "layers": self.layers,
            "n_prompt": self.n_prompt,
            "n_gen": self.n_gen,
            "rounds": self.rounds,
            "turns": [self.turns, self.turns * REPLY_TURNS],
            "threads": self.threads,
            "kernels": kernels.version(),
        }


def machine_facts() -> dict[str, Any]:
    """Return the processor, and the load before anything is timed."""
    return {"cpu": cpu_name(), "load_before": round(os.getloadavg()[0], 2)}


def measure_speeds(timing: Timing) -> list[SpeedRow]:
    """Time each type."""
    timed = {variant.word: variant for variant in timed_variants()}
    rounds = time_beside_base(timing, {word: word for word in timed})
    hp = with_layers(shape_of(PRESET, quick=timing.quick).hp, timing.layers)
    rows = []
    for word, variant in timed.items():
        prompt, decode = ([round(pair[at].ours, 3) for pair in rounds[word]] for at in range(2))
        n_read = size_of(hp, word).n_bytes_per_token
        ratios = ratios_of(rounds[word])
        rows.append(SpeedRow(word, variant.imatrix, variant.digest, n_read, prompt, decode, *ratios))
    return rows


def time_beside_base(timing: Timing, choices: Mapping[str, str | TypeChoice]) -> Mapping[str, Sequence[Pair]]:
    """Time each type beside the base; return one pair for each round, under the type's name."""
    shape = shape_of(PRESET, quick=timing.quick)
    files = {name: model_file(shape, timing.layers, choice) for name, choice in choices.items()}
    base = model_file(shape, timing.layers, BASE)

    def pair(name: str, number: int) -> Pair:
        return time_pair(files[name], base, timing, base_first=number % 2 == 0)

    return in_turn({name: partial(pair, name) for name in files}, timing.rounds, n_warm_up=0, told=_told)


def _told(pair: Pair) -> str:
    return ", ".join(f"{row.measure} {row.ours:.2f} ({row.result:.3f} x {BASE})" for row in pair)


def ratios_of(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """Return the ratios to the base's speed in each round, of prompts and of decoding."""
    prompt, decode = ([round(pair[at].result, 4) for pair in pairs] for at in range(2))
    return prompt, decode


def time_pair(path: Path, base: Path, timing: Timing, *, base_first: bool = False) -> Pair:
    """Load both models, time them in turn, and close them. `base_first` changes which is loaded first, since
    memory that is taken first may be faster.
    """
    prompt, reply = workloads_of([timing.n_prompt], [timing.n_gen])
    with ExitStack() as stack:
        timers = {
            name: Timer(stack.enter_context(EngineClient.load(_options(each, (prompt, reply), timing))))
            for name, each in ((("base", base), ("model", path))[:: 1 if base_first else -1])
        }
        return (
            _compared(timers, prompt, timing.turns),
            _compared(timers, reply, timing.turns * REPLY_TURNS),
        )


def _compared(timers: Mapping[str, Timer], workload: Workload, turns: int) -> Row:
    """Compare the model with the base, in tokens per second."""

    def rate(name: str, _: int) -> float:
        return workload.n_tokens / timers[name].time(workload)

    rates = in_turn({name: partial(rate, name) for name in ("base", "model")}, turns, told=None)
    return compare(workload.label, rates, "model", "base")


def _options(path: Path, workloads: Sequence[Workload], timing: Timing) -> ModelOptions:
    return options_for(ModelOptions(path, n_threads=timing.threads), workloads)
