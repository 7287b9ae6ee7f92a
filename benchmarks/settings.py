"""Are the default settings the fastest? Contenders change threads, ubatch, attention, kernels or waiting.

    python -m benchmarks.settings                                  the 16B shape with 4 layers
    python -m benchmarks.settings --shape qwen3-30b-a3b --layers 3
    python -m benchmarks.settings --model FILE                     a model of your own
    python -m benchmarks.settings --only GOMP --busy 1             beside one process that uses a whole core
    python -m benchmarks.settings --types Q4_K_M,q4,q4-fast --only kernels --base "kernels repack"
    python -m benchmarks.settings --quick                          does it run? the figures mean nothing

Models have random weights and are kept in the cache. In each round, the model is loaded with the settings of
each contender, those that contain the word of --only, and of the base once more, as a control. With several
types, each contender loads each type, and the base is the first type. Speeds are the faster of two
repetitions. Files are read from the page cache. Prints a table, then one JSON line.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.support import arguments
from benchmarks.support.random_models import measure_speed, model_file, shape_of
from benchmarks.support.runner import compare_all, in_turn
from benchmarks.support.tables import report
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.timing import Workload

DEFAULTS = "defaults"
SPINS = "GOMP_SPINCOUNT"
"""How often a thread of OpenMP checks a barrier before it sleeps."""


def contenders() -> dict[str, dict[str, Any]]:
    """Return what each contender changes: fields of ModelOptions, or the variable SPINS."""
    cores = physical_cores()
    changes: dict[str, dict[str, Any]] = {
        DEFAULTS: {},
        "llama.cpp's": {"kernels": "repack", "flash_attention": "on", SPINS: 300_000},
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
    """Measure a model with changed settings. `_` is the round."""
    fields = dict(changes)
    spins = fields.pop(SPINS, None)
    if spins is not None:
        os.environ[SPINS] = str(spins)
    try:
        return measure_speed(replace(options, **fields), workloads)
    finally:
        if spins is not None:
            del os.environ[SPINS]


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
    given = arguments.parse(
        __doc__,
        model=Path,
        shape="deepseekmoe-16b",
        layers=4,
        types=("q4",),
        rounds=3,
        prompts=(32, 512, 4096),
        depths=(0, 4096),
        n_gen=32,
        only="",
        base=DEFAULTS,
        busy=0,
        quick=False,
    )
    shape = shape_of(given.shape, quick=given.quick)
    if given.model:
        title, files = given.model.name, {given.model.stem: given.model}
    else:
        title = f"{shape.name}, {given.layers} layers"
        files = {word: model_file(shape, given.layers, word) for word in given.types}
    workloads = (
        *(Workload(count, 0) for count in given.prompts),
        *(Workload(0, given.n_gen, depth) for depth in given.depths),
    )
    wanted = {
        f"{word} {name}": partial(measure, ModelOptions(path), changes, workloads)
        for word, path in files.items()
        for name, changes in contenders().items()
        if given.only in name or name == given.base
    }
    base = f"{next(iter(files))} {given.base}"
    with busy(given.busy):
        rounds = in_turn(wanted, given.rounds, base, n_warm_up=0)
    record = {"model": title, "cores": physical_cores(), "busy": given.busy, "rounds": given.rounds}
    report(
        f"{title}, {physical_cores()} cores, {given.busy} busy processes", compare_all(rounds, base), record
    )


if __name__ == "__main__":
    main()
