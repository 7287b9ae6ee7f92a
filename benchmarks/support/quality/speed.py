"""The speed of the types on the 16B shape with a few layers: the part `speed` of benchmarks/quality.py.

Each type is loaded together with the base, and both are timed in turn, a few seconds each, so that other load
on the machine affects both. Every round loads them anew, because memory is not equally fast everywhere. The
weights are random.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.support.quality.figures import SpeedRow
from benchmarks.support.quality.variants import BASE, TIMED, Variant
from benchmarks.support.random_models import model_file, shape_of, with_layers
from benchmarks.support.runner import Row, compare, in_turn
from benchmarks.support.sizes import size_of
from benchmarks.support.tables import LOAD
from dsmoe_local.engine.load.kernels import Kernels
from dsmoe_local.engine.load.machine import cpu_name
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.timing import Timer, Workload, options_for, workloads_of
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
    return {"cpu": cpu_name(), "load_before": round(LOAD, 2)}


def measure_speeds(timing: Timing) -> list[SpeedRow]:
    """Time each type as `--kernels auto` loads it, and the base repacked as a control."""
    shape = shape_of(PRESET, quick=timing.quick)
    files = {word: model_file(shape, timing.layers, word) for word in TIMED}
    cases = {f"{BASE} {Kernels.REPACK}": (BASE, Kernels.REPACK)}
    cases |= {f"{word} {Kernels.AUTO}": (word, Kernels.AUTO) for word in TIMED}

    def pair(word: str, how: Kernels, number: int) -> Pair:
        return time_pair(files[word], how, files[BASE], timing, base_first=number % 2 == 0)

    contenders = {name: partial(pair, *case) for name, case in cases.items()}
    rounds = in_turn(contenders, timing.rounds, n_warm_up=0, told=_told)
    hp = with_layers(shape.hp, timing.layers)
    rows = []
    for name, (word, how) in cases.items():
        prompt, decode = ([round(pair[at].ours, 3) for pair in rounds[name]] for at in range(2))
        ratios = [[round(pair[at].result, 4) for pair in rounds[name]] for at in range(2)]
        n_read = size_of(hp, word).n_bytes_per_token
        digest = Variant(word, False).digest
        rows.append(SpeedRow(word, False, digest, n_read, prompt, decode, ratios[0], ratios[1], str(how)))
    return rows


def _told(pair: Pair) -> str:
    return ", ".join(f"{row.measure} {row.ours:.2f} ({row.result:.3f} x {BASE})" for row in pair)


def time_pair(path: Path, how: Kernels, base: Path, timing: Timing, *, base_first: bool = False) -> Pair:
    """Load a model, and the base repacked; time them in turn, and close them.

    `base_first` changes which is loaded first, since memory that is taken first may be faster.
    """
    prompt, reply = workloads_of([timing.n_prompt], [timing.n_gen])
    sides = [("base", base, Kernels.REPACK), ("model", path, how)]
    timers = {}
    with ExitStack() as stack:
        for name, each, form in sides if base_first else reversed(sides):
            options = ModelOptions(each, n_threads=timing.threads, kernels=form.value)
            engine = stack.enter_context(EngineClient.load(options_for(options, (prompt, reply))))
            timers[name] = Timer(engine)
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
