"""How fast the types are on the 16B shape with a few layers: the part `speed` of benchmarks/quality.py.

Each type is loaded together with the base, and both are timed in turn, a few seconds each: whatever else the
machine does, both feel. Every round loads them anew, since memory is not as fast in every place. Files have
random weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.support.quality_figures import SpeedRow
from benchmarks.support.quality_recipes import BASE, timed_variants
from benchmarks.support.random_models import Shape, model_file, shape_of, with_layers
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
"""Replies are timed so many times as often as prompts: they are shorter, and types differ less in them."""

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

    def pair(name: str, number: int) -> Pair:
        return time_pair(files[name], base, timing, base_first=number % 2 == 0)

    return in_turn({name: partial(pair, name) for name in files}, timing.rounds, n_warm_up=0, told=_told)


def _told(pair: Pair) -> str:
    return ", ".join(f"{row.measure} {row.ours:.2f} ({row.result:.3f} x {BASE})" for row in pair)


def _rounds(pairs: Sequence[Pair]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Rates of prompts and of decoding, then their ratios, as rows have them."""
    prompt, decode = ([round(pair[at].ours, 3) for pair in pairs] for at in range(2))
    return prompt, decode, *ratios_of(pairs)


def ratios_of(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """To the base, of prompts and of decoding, round by round."""
    prompt, decode = ([round(pair[at].result, 4) for pair in pairs] for at in range(2))
    return prompt, decode


def time_pair(path: Path, base: Path, timing: Timing, *, base_first: bool = False) -> Pair:
    """Load both, time them in turn, give them back. Memory that is taken first may be the faster one:
    `base_first` changes who loads first.
    """
    prompt, reply = workloads_of([timing.n_prompt], [timing.n_gen])
    options = partial(_options, workloads=(prompt, reply), threads=timing.threads)
    with ExitStack() as stack:
        timers = {
            name: Timer(stack.enter_context(EngineClient.load(options(each))))
            for name, each in ((("base", base), ("model", path))[:: 1 if base_first else -1])
        }
        return (
            _compared(timers, prompt, timing.turns),
            _compared(timers, reply, timing.turns * REPLY_TURNS),
        )


def _compared(timers: Mapping[str, Timer], workload: Workload, turns: int) -> Row:
    """Tokens per second of the model and of the base."""

    def rate(name: str, _: int) -> float:
        return workload.n_tokens / timers[name].time(workload)

    rates = in_turn({name: partial(rate, name) for name in ("base", "model")}, turns, told=None)
    return compare(workload.label, rates, "model", "base")


def _options(path: Path, workloads: Sequence[Workload], threads: int) -> ModelOptions:
    return options_for(ModelOptions(path, n_threads=threads), workloads)
