"""Are the default settings the fastest? Contenders change threads, ubatch, attention, kernels or waiting.

    python -m benchmarks.settings                                  the 16B shape with 4 layers
    python -m benchmarks.settings --shape qwen3-30b-a3b --layers 3
    python -m benchmarks.settings --model FILE                     a model of your own
    python -m benchmarks.settings --only GOMP --busy 1             beside one process that uses a whole core
    python -m benchmarks.settings --types Q4_K_M,q4,q4-fast --only kernels --base "kernels repack"
    python -m benchmarks.settings --quick                          does it run? the figures mean nothing

Models have random weights and are kept in the cache. The model is loaded with the settings of each contender
that contains the word of --only, and of the base twice, as a control; all of them at the same time. They then
run each workload in turn, so that a slow minute of the machine slows all. With several types, each contender
loads each type, and the base is the first type. Files are read from the page cache. Prints a table, then one
JSON line.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.support import arguments
from benchmarks.support.random_models import memory_of, model_file, shape_of
from benchmarks.support.runner import CONTROL, Row, compare, in_turn, say
from benchmarks.support.tables import report
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.speed.timing import Timer, Workload, options_for

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


def load(options: ModelOptions, changes: Mapping[str, Any], workloads: Sequence[Workload]) -> EngineClient:
    """Load a model with changed settings."""
    fields = dict(changes)
    spins = fields.pop(SPINS, None)
    if spins is not None:
        os.environ[SPINS] = str(spins)
    try:
        return EngineClient.load(options_for(replace(options, **fields), workloads))
    finally:
        if spins is not None:
            del os.environ[SPINS]


def rate(timer: Timer, workload: Workload, _: int) -> float:
    """Return the tokens per second of a workload. `_` is the round."""
    return workload.n_tokens / timer.time(workload)


def rows_of(
    engines: Mapping[str, EngineClient], workloads: Sequence[Workload], n_rounds: int, base: str
) -> Iterator[Row]:
    """Run all workloads in turn, and compare all engines with the base. `base` + CONTROL is one of them."""
    timers = {name: Timer(engine) for name, engine in engines.items()}
    others = [name for name in engines if name not in (base, base + CONTROL)]
    for workload in workloads:
        say(f"{workload.label}:")
        rates = in_turn({name: partial(rate, timer, workload) for name, timer in timers.items()}, n_rounds)
        yield from (compare(f"{workload.label}, {name}", rates, name, base) for name in others)
    memory = {name: memory_of(engine.pid) for name, engine in engines.items()}
    for kind in memory[base]:
        values = {name: [found[kind]] for name, found in memory.items()}
        yield from (compare(f"{kind} memory, {name}", values, name, base, unit="GB") for name in others)


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
        rounds=7,
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
        f"{word} {name}": partial(load, ModelOptions(path), changes, workloads)
        for word, path in files.items()
        for name, changes in contenders().items()
        if given.only in name or name == given.base
    }
    base = f"{next(iter(files))} {given.base}"
    wanted[base + CONTROL] = wanted[base]
    with ExitStack() as stack:
        engines = {name: stack.enter_context(make()) for name, make in wanted.items()}
        stack.enter_context(busy(given.busy))
        rows = list(rows_of(engines, workloads, given.rounds, base))
    record = {"model": title, "cores": physical_cores(), "busy": given.busy, "rounds": given.rounds}
    report(f"{title}, {physical_cores()} cores, {given.busy} busy processes", rows, record)


if __name__ == "__main__":
    main()
