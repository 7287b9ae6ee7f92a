"""Decoding a model that exceeds the memory: ours against llama.cpp in a memory cgroup. Table, then JSON.

    python -m benchmarks.low_memory MODEL.gguf [--share 0.6] [--tokens 64] [--rounds 3] [--threads N]

Needs root on Linux, for the cgroup (v1 or v2) of SHARE times the file's size. All decode the same random
tokens one at a time, after a prompt of 64, each in a process of its own and with a cold cache, in turn. How
far the disk reads ahead (/sys/block/*/queue/read_ahead_kb) is printed too: the further, the more llama.cpp's
page faults read that nobody needs. A model of random weights routes more evenly than a trained one, so that
less of what it needs stays in memory.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

from benchmarks.support import arguments
from benchmarks.support.runner import in_turn
from benchmarks.support.tables import show
from dsmoe_local.base.progress import ignore
from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine import native
from dsmoe_local.engine.load.loaded_model import load_model
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.types import ModelOptions

BAR = 1.3
CGROUPS = Path("/sys/fs/cgroup")
PROMPT, WARM_UP, CONTEXT = 64, 16, 512
OURS = "ours"
Decode: TypeAlias = Callable[[native.Row], None]


@contextmanager
def ours(path: Path, threads: int) -> Iterator[Decode]:
    """Load a model as the engine does. Yields what decodes a row."""
    options = ModelOptions(path, n_context=CONTEXT, n_threads=threads)
    with closing(load_model(options, ignore, threading.Event())) as loaded:

        def decode(row: native.Row) -> None:
            loaded.observers.before_step([row])
            assert loaded.context.decode([row]) == native.DECODED
            loaded.observers.after_step([row], loaded.context.logits())

        yield decode


@contextmanager
def bare(path: Path, threads: int, *, repack: bool) -> Iterator[Decode]:
    """Load a model as llama.cpp does by itself. Yields what decodes a row."""
    options = native.ContextOptions(
        n_context=CONTEXT, n_batch=CONTEXT, n_ubatch=CONTEXT, n_threads=threads, n_threads_batch=threads
    )
    with (
        closing(native.Model(path, repack=repack)) as model,
        closing(native.Context(model, options)) as context,
    ):

        def decode(row: native.Row) -> None:
            assert context.decode([row]) == native.DECODED
            context.logits()

        yield decode


SIDES: Mapping[str, Callable[[Path, int], AbstractContextManager[Decode]]] = {
    OURS: ours,
    "llama.cpp as it loads by itself": partial(bare, repack=True),
    "llama.cpp without repacking": partial(bare, repack=False),
}


def work(name: str, path: Path, tokens: int, threads: int, seed: int) -> dict[str, float]:
    """Load and decode in this process, which is limited. Return what it took."""
    generator = random.Random(seed)
    ids = [generator.randrange(1000, 30_000) for _ in range(PROMPT + WARM_UP + tokens)]
    began = time.perf_counter()
    with SIDES[name](path, threads) as decode:
        loaded = time.perf_counter()
        decode(native.Row(0, 0, ids[:PROMPT], 1))
        read = time.perf_counter()
        for position in range(PROMPT, len(ids)):
            if position == PROMPT + WARM_UP:
                before, n_faults, started = _read_bytes(), _faults(), time.perf_counter()
            decode(native.Row(0, position, ids[position : position + 1], 1))
        return {
            "load_seconds": loaded - began,
            "prompt": PROMPT / (read - loaded),
            "decode": tokens / (time.perf_counter() - started),
            "read_per_token": (_read_bytes() - before) / tokens,
            "faults_per_token": (_faults() - n_faults) / tokens,
        }


def _faults() -> int:
    """Return the page faults of this process that waited for the disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


@contextmanager
def limited(n_bytes: int) -> Iterator[Path]:
    """Make a memory cgroup without swap. It is removed when the block ends."""
    old = CGROUPS / "memory"
    limit, swap = ("limit_in_bytes", "swappiness") if old.is_dir() else ("max", "swap.max")
    group = (old if old.is_dir() else CGROUPS) / f"dsmoe-low-memory-{os.getpid()}"
    group.mkdir()
    try:
        (group / f"memory.{limit}").write_text(str(n_bytes))
        (group / f"memory.{swap}").write_text("0")
        yield group
    finally:
        group.rmdir()


def measure(
    name: str, model: Path, n_bytes: int, tokens: int, threads: int, seed: int
) -> Mapping[str, float]:
    """Measure one side in a process of its own. Return {} if it was killed for memory."""
    with model.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with limited(n_bytes) as group:
        words = (name, model, tokens, threads, seed, group)
        command = [sys.executable, "-m", "benchmarks.low_memory", "--worker", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return {}
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-800:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def read_ahead(path: Path) -> str:
    """Return how far the disk of a file reads ahead."""
    device = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (folder / "queue", folder / ".." / "queue"):
        if (queue / "read_ahead_kb").exists():
            return (queue / "read_ahead_kb").read_text().strip() + " KB"
    return "unknown"


def main() -> None:
    """Measure and print."""
    given = arguments.parse(__doc__, "model", share=0.6, tokens=64, rounds=3, threads=physical_cores())
    n_bytes = int(given.share * given.model.stat().st_size)
    contenders = {
        name: partial(measure, name, given.model, n_bytes, given.tokens, given.threads) for name in SIDES
    }
    found = in_turn(contenders, given.rounds, n_warm_up=0)
    medians = {
        name: {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        for name, runs in found.items()
        if all(runs)
    }
    rows = [(name, *cells(medians[name])) for name in medians]
    rows += [(name, "killed for memory", "", "", "", "") for name in SIDES if name not in medians]
    limit = f"{format_size(n_bytes)} of memory, {given.threads} threads"
    heads = ("", "tokens/s", "prompt", "read/token", "faults", "load")
    show(f"{limit}, read-ahead {read_ahead(given.model)}", heads, "lrrrrr", rows)
    for name in medians:
        print(f"{OURS} / {name}: {medians[OURS]['decode'] / medians[name]['decode']:.2f} (bar {BAR})")
    print(json.dumps(medians))


def cells(found: Mapping[str, float]) -> tuple[str, ...]:
    """Return the row of one side."""
    return (
        f"{found['decode']:.2f}",
        f"{found['prompt']:.1f}",
        format_size(int(found["read_per_token"])),
        f"{found['faults_per_token']:.1f}",
        f"{found['load_seconds']:.1f} s",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, model, *numbers, group = sys.argv[2:]
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
        print(json.dumps(work(name, Path(model), *map(int, numbers))), flush=True)
    else:
        main()
