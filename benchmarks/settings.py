"""Are the default settings the fastest? Contenders change threads, ubatch, attention, kernels or waiting.

    python -m benchmarks.settings                                  the 16B shape with 4 layers
    python -m benchmarks.settings --shape qwen3-30b-a3b --layers 3
    python -m benchmarks.settings --model FILE                     a model of your own
    python -m benchmarks.settings --busy 1                         beside one process that uses a whole core
    python -m benchmarks.settings --quick                          does it run? the figures mean nothing

In each round, the model is loaded with every contender's settings, and with the defaults once more, as a
control. Each figure is the faster of two repetitions. Ratios are to the defaults in the same round.

Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.support.random_models import model_file, shape_of
from benchmarks.support.runner import CONTROL, in_turn, is_difference, off_by
from benchmarks.support.tables import markdown
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.timing import Workload, options_for, time_workloads

DEFAULTS = "defaults"
SPINS = "GOMP_SPINCOUNT"
"""How often a thread of OpenMP checks a barrier before it sleeps."""


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FILE", help="instead of random weights")
    parser.add_argument("--shape", default="deepseekmoe-16b", metavar="PRESET", help="[deepseekmoe-16b]")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="[4]")
    parser.add_argument("--type", default="q4", metavar="TYPE", help="[q4]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="[3]")
    parser.add_argument("--prompts", default="32,512,4096", metavar="N,N", help="tokens [32,512,4096]")
    parser.add_argument("--depths", default="0,4096", metavar="N,N", help="of replies [0,4096]")
    parser.add_argument("-n", "--n-gen", type=int, default=32, metavar="N", help="tokens of a reply [32]")
    parser.add_argument("--only", default="", metavar="WORD", help="only contenders that contain WORD")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="processes that use a core [0]")
    parser.add_argument("--quick", action="store_true", help="a small shape; the figures mean nothing")
    return parser.parse_args()


def contenders() -> dict[str, dict[str, Any]]:
    """Return what each contender changes: fields of ModelOptions, or the variable SPINS."""
    cores = physical_cores()
    changes: dict[str, dict[str, Any]] = {
        "llama.cpp's": {"kernels": "repack", "flash_attention": "on", SPINS: 300_000}
    }
    changes |= {f"ubatch {size}": {"n_ubatch": size} for size in (256, 1024, 2048)}
    changes |= {f"flash attention {mode}": {"flash_attention": mode} for mode in ("on", "off")}
    changes |= {f"kernels {form}": {"kernels": form} for form in ("repack", "tiled", "plain")}
    fewer = {max(1, cores - 1), os.cpu_count() or 1} - {cores}
    changes |= {f"threads {count}": {"n_threads": count} for count in sorted(fewer)}
    return changes | {f"{SPINS} {count}": {SPINS: count} for count in (0, 300, 1_000, 10_000, 300_000)}


def measure(
    options: ModelOptions, changes: Mapping[str, Any], workloads: tuple[Workload, ...], _: int
) -> dict[str, float]:
    """Return the tokens per second of each workload, by its label. `_` is the round."""
    fields = {name: value for name, value in changes.items() if name != SPINS}
    if SPINS in changes:
        os.environ[SPINS] = str(changes[SPINS])
    try:
        with EngineClient.load(options_for(replace(options, **fields), workloads)) as engine:
            found = time_workloads(engine, workloads, 2)
    finally:
        os.environ.pop(SPINS, None)
    return {each.workload.label: each.workload.n_tokens / min(each.seconds) for each in found}


def _spin() -> None:
    while True:
        pass


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run processes that each use a core."""
    processes = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def main() -> None:
    """Measure and print."""
    given = arguments()
    shape = shape_of(given.shape, quick=given.quick)
    path = given.model or model_file(shape, given.layers, given.type)
    workloads = (
        *(Workload(int(count), 0) for count in given.prompts.split(",") if count),
        *(Workload(0, given.n_gen, int(depth)) for depth in given.depths.split(",") if depth),
    )
    wanted = {DEFAULTS: {}, **{name: each for name, each in contenders().items() if given.only in name}}
    options = ModelOptions(path)
    with busy(given.busy):
        speeds = in_turn(
            {name: partial(measure, options, changes, workloads) for name, changes in wanted.items()},
            given.rounds,
            DEFAULTS,
            n_warm_up=0,
            told=lambda each: ", ".join(f"{label} {rate:.1f}" for label, rate in each.items()),
        )
    control = speeds.pop(DEFAULTS + CONTROL)
    labels = [workload.label for workload in workloads]
    rows, record = [], {}
    for name, rounds in speeds.items():
        cells = [name]
        for label in labels:
            bases = [each[label] for each in speeds[DEFAULTS]]
            off = off_by(each[label] / base for each, base in zip(control, bases, strict=True))
            rate = statistics.median(each[label] for each in rounds)
            ratio = statistics.median(each[label] / base for each, base in zip(rounds, bases, strict=True))
            told = f"{ratio:.2f} x" if is_difference(ratio, off) else f"({ratio:.2f} x)"
            cells.append(f"{rate:.1f} t/s, control {off:.2f}" if name == DEFAULTS else told)
            record[f"{name}, {label}"] = {
                "rate": round(rate, 2),
                "ratio": round(ratio, 4),
                "control": round(off, 4),
            }
        rows.append(cells)
    title = path.name if given.model else f"{shape.name}, {given.layers} layers, {given.type}"
    print(
        f"{title}, {physical_cores()} cores, {given.busy} busy processes; in brackets: within the control\n"
    )
    print(markdown(("settings", *labels), "l" + "r" * len(labels), rows) + "\n")
    print(json.dumps({"model": title, "busy": given.busy, "rounds": given.rounds, "result": record}))


if __name__ == "__main__":
    main()
