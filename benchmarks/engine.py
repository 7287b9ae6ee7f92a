"""How fast is the engine? Against bare llama_decode loops, llama_cpp.Llama, and llama.cpp's own programs.

    python benchmarks/engine.py                                  the demo model (dsmoe demo makes it)
    python benchmarks/engine.py --llama-cpp BUILD/bin            and against llama-bench, llama-server, ...
    python benchmarks/engine.py --shape-16b-layers 6             random weights of the 16B's shape, in 4 bits
    python benchmarks/engine.py --model FILE --only stream,turn  some rows, any file
    python benchmarks/engine.py --quick                          all of it, small: does it run?

A table, then one JSON line. Everybody is greedy, generates the same number of tokens from the same ids, uses
the same number of threads and F16 for the KV cache; contenders run in turn, and medians count. Ours is
measured from the caller's side, through the client unless --engine says otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.support.bare import read_vocabulary
from benchmarks.support.measures import MEASURES, QUICK, Bench, Sizes
from benchmarks.support.ours import LOADERS
from benchmarks.support.runner import Row, say
from benchmarks.support.tables import report
from benchmarks.support.workloads import Corpus, help_texts
from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_local.base.paths import cache_folder, demo_folder
from dsmoe_local.engine.load.machine import physical_cores

DEMO = "demo-q4.gguf"
SHAPE_TYPE = "q4"
CACHES = {"unified": True, "streams": False}


def shape_file(layers: int) -> Path:
    """The 16B's shape with fewer layers and random weights, in 4 bits; kept in the cache once made."""
    folder = cache_folder() / "benchmarks"
    out = folder / f"shape-16b-{layers}-layers-{SHAPE_TYPE}.gguf"
    if not out.exists():
        checkpoint = folder / f"shape-16b-{layers}-layers"
        say(f"making {out} (once)")
        make_checkpoint(checkpoint, layers=layers)
        convert_folder(checkpoint, out, ConvertOptions(SHAPE_TYPE), RunOptions(force=True))
        shutil.rmtree(checkpoint)
    return out


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="FILE", help="a GGUF file [the demo's]")
    model.add_argument(
        "--shape-16b-layers", type=int, metavar="N", help="the 16B's shape with N layers, of 28"
    )
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="DIR", help="a build of llama.cpp, or its bin folder"
    )
    parser.add_argument("--only", metavar="ROW,...", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--engine", choices=list(LOADERS), default="client", help="ours [client]")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds that count, after one that does not [3]"
    )
    parser.add_argument("--slots", type=int, metavar="N", help="ours and llama-server's [16]")
    parser.add_argument(
        "--cache",
        choices=list(CACHES),
        help="ours against llama-server: one pool, or streams [the row's own]",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes; the figures mean nothing")
    given = parser.parse_args()
    unknown = set((given.only or "").split(",")) - set(MEASURES) - {""}
    if unknown:
        parser.error(f"--only takes {', '.join(MEASURES)}")
    return given


def sizes_of(given: argparse.Namespace) -> Sizes:
    """How much to measure."""
    sizes = QUICK if given.quick else Sizes()
    if given.rounds is not None:
        sizes = replace(sizes, rounds=given.rounds)
    if given.slots is not None:
        # As the batch does: enough in flight that no slot waits for a client.
        sizes = replace(sizes, n_slots=given.slots, n_clients=2 * given.slots)
    return sizes


def model_of(given: argparse.Namespace) -> Path:
    """The file to measure with."""
    if given.shape_16b_layers is not None:
        return shape_file(given.shape_16b_layers)
    path: Path = given.model or demo_folder() / DEMO
    if not path.is_file():
        raise SystemExit(f"there is no {path}" + ("" if given.model else ": dsmoe demo makes it"))
    return path


def main() -> None:
    """Measure, print."""
    given = arguments()
    path = model_of(given)
    vocabulary = read_vocabulary(path, help_texts())
    bench = Bench(
        path,
        vocabulary,
        Corpus(vocabulary.corpus),
        sizes_of(given),
        given.threads,
        given.engine,
        given.llama_cpp,
        is_demo=path.name == DEMO,
        unified=CACHES.get(given.cache),
    )
    load = os.getloadavg()[0]
    if load > 0.3:
        say(f"the machine is busy (load {load:.1f}): figures will be too low and scattered")
    rows: list[Row] = []
    started = time.monotonic()
    try:
        for name in given.only.split(",") if given.only else MEASURES:
            say(f"{name} ({time.monotonic() - started:.0f} s)")
            rows += MEASURES[name](bench)
    finally:
        # A run takes long: what was measured is shown even if something ends it early.
        record = {
            "model": path.name,
            "threads": given.threads,
            "engine": given.engine,
            "load_before": round(load, 2),
            "rounds": bench.sizes.rounds,
        }
        report(f"{path.name}, {given.threads} threads, ours: {given.engine}", rows, record)


if __name__ == "__main__":
    main()
