"""How fast is the engine? Against bare llama_decode loops, llama_cpp.Llama, and llama.cpp's own programs.

    python benchmarks/engine.py                                  the demo model (dsmoe demo makes it)
    python benchmarks/engine.py --llama-cpp BUILD/bin            and against llama-bench, llama-server, ...
    python benchmarks/engine.py --shape-16b-layers 6             random weights of the 16B's shape, in 4 bits
    python benchmarks/engine.py --model FILE --only stream,turn  some rows, any file
    python benchmarks/engine.py --engine in-process              our engine without its child process
    python benchmarks/engine.py --quick                          all of it, small: does it run?

A table, then one JSON line. All contenders are greedy, generate the same number of tokens from the same ids,
and have the same number of threads and a KV cache in F16. They run in turn, after a warm-up round. Medians
count. Our engine is timed by its caller.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.support import arguments
from benchmarks.support.bare import read_vocabulary
from benchmarks.support.measures import MEASURES, QUICK, Bench, Sizes
from benchmarks.support.runner import Row, say
from benchmarks.support.tables import report
from benchmarks.support.workloads import Corpus, help_texts
from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_local.base.paths import cache_folder, demo_folder
from dsmoe_local.engine.load.machine import physical_cores

DEMO = "demo-q4.gguf"


def shape_file(layers: int) -> Path:
    """Return the 16B's shape with fewer layers and random weights, in 4 bits. It is kept in the cache."""
    folder = cache_folder() / "benchmarks"
    out = folder / f"shape-16b-{layers}-layers-q4.gguf"
    if not out.exists():
        checkpoint = folder / f"shape-16b-{layers}-layers"
        say(f"making {out} (once)")
        make_checkpoint(checkpoint, layers=layers)
        convert_folder(checkpoint, out, ConvertOptions("q4"), RunOptions(force=True))
        shutil.rmtree(checkpoint)
    return out


def main() -> None:
    """Measure and print."""
    given = arguments.parse(
        __doc__,
        model=demo_folder() / DEMO,
        shape_16b_layers=0,
        llama_cpp=Path,
        only=tuple(MEASURES),
        engine="client",
        threads=physical_cores(),
        rounds=Sizes().rounds,
        quick=False,
    )
    path = shape_file(given.shape_16b_layers) if given.shape_16b_layers else given.model
    vocabulary = read_vocabulary(path, help_texts())
    bench = Bench(
        path,
        vocabulary,
        Corpus(vocabulary.corpus),
        QUICK if given.quick else replace(Sizes(), rounds=given.rounds),
        given.threads,
        given.engine,
        given.llama_cpp,
        is_demo=path.name == DEMO,
    )
    rows: list[Row] = []
    started = time.monotonic()
    try:
        for name in given.only:
            say(f"{name} ({time.monotonic() - started:.0f} s)")
            rows += MEASURES[name](bench)
    finally:
        # A run takes long: rows are shown even if an error ends it early.
        record = {"model": path.name, "threads": given.threads, "engine": given.engine}
        title = f"{path.name}, {given.threads} threads, ours: {given.engine}"
        report(title, rows, {**record, "rounds": bench.sizes.rounds})


if __name__ == "__main__":
    main()
