"""Decoding a model that exceeds the memory: ours against llama.cpp in a memory cgroup. Table, then JSON.

    python benchmarks/low_memory.py MODEL.gguf [--share 0.6] [--tokens 64] [--repeat 3] [--threads N]

Needs root on Linux, for the cgroup (v1 or v2) of SHARE times the file's size. All decode the same random
tokens one at a time, after a prompt of 64, each in a process of its own and with a cold cache, in turn. How
far the disk reads ahead (/sys/block/*/queue/read_ahead_kb) is printed too: the further, the more llama.cpp's
page faults read that nobody needs. A model of random weights routes more evenly than a trained one, so that
less of what it needs stays in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from benchmarks.support.runner import in_turn
from benchmarks.support.tables import show
from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine import native
from dsmoe_local.engine.load.loaded_model import load_model
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.engine.types import ModelOptions

BAR = 1.3
CGROUPS = Path("/sys/fs/cgroup")
PROMPT, WARM_UP, CONTEXT = 64, 16, 512
SIDES = {
    "default": "llama.cpp as it loads by itself",
    "mapped": "llama.cpp without repacking",
    "ours": "ours",
}


class Side(Protocol):
    """What decodes rows and frees itself."""

    def decode(self, row: native.Row) -> None:
        """One step."""

    def close(self) -> None:
        """Free the model."""


class Ours:
    """The engine's own load, and its context and observers step by step."""

    def __init__(self, path: Path, threads: int) -> None:
        options = ModelOptions(path, n_context=CONTEXT, n_threads=threads)
        self._loaded = load_model(options, lambda event: None, threading.Event())

    def decode(self, row: native.Row) -> None:
        """See Side."""
        self._loaded.observers.before_step([row])
        assert self._loaded.context.decode([row]) == native.DECODED
        self._loaded.observers.after_step([row], self._loaded.context.logits())

    def close(self) -> None:
        """See Side."""
        self._loaded.close()


class Bare:
    """A bare loop over llama.cpp's own mapping."""

    def __init__(self, path: Path, threads: int, *, repack: bool) -> None:
        self._model = native.Model(path, repack=repack)
        options = native.ContextOptions(
            n_context=CONTEXT, n_batch=CONTEXT, n_ubatch=CONTEXT, n_threads=threads, n_threads_batch=threads
        )
        self._context = native.Context(self._model, options)

    def decode(self, row: native.Row) -> None:
        """See Side."""
        assert self._context.decode([row]) == native.DECODED
        self._context.logits()

    def close(self) -> None:
        """See Side."""
        self._context.close()
        self._model.close()


def work(name: str, path: Path, group: Path, tokens: int, threads: int, seed: int) -> None:
    """In the process that is limited: load, decode, print what it took as JSON."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    begin = time.perf_counter()
    side: Side = Ours(path, threads) if name == "ours" else Bare(path, threads, repack=name == "default")
    loaded = time.perf_counter() - begin
    generator = random.Random(seed)
    ids = [generator.randrange(1000, 30_000) for _ in range(PROMPT + WARM_UP + tokens)]
    begin = time.perf_counter()
    side.decode(native.Row(0, 0, ids[:PROMPT], 1))
    prompt = time.perf_counter() - begin
    for position in range(PROMPT, PROMPT + WARM_UP):
        side.decode(native.Row(0, position, ids[position : position + 1], 1))
    before, faults = _read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    begin = time.perf_counter()
    for position in range(PROMPT + WARM_UP, len(ids)):
        side.decode(native.Row(0, position, ids[position : position + 1], 1))
    seconds = time.perf_counter() - begin
    result = {
        "load_seconds": loaded,
        "prompt": PROMPT / prompt,
        "decode": tokens / seconds,
        "read_per_token": (_read_bytes() - before) / tokens,
        "faults_per_token": (resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults) / tokens,
    }
    print(json.dumps(result), flush=True)
    side.close()


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


@contextmanager
def limited(n_bytes: int) -> Iterator[Path]:
    """A memory cgroup without swap, removed at the end."""
    old = CGROUPS / "memory"
    group = (old if old.is_dir() else CGROUPS) / f"dsmoe-low-memory-{os.getpid()}"
    group.mkdir()
    try:
        if old.is_dir():
            (group / "memory.limit_in_bytes").write_text(str(n_bytes))
            (group / "memory.swappiness").write_text("0")
        else:
            (group / "memory.max").write_text(str(n_bytes))
            (group / "memory.swap.max").write_text("0")
        yield group
    finally:
        group.rmdir()


def measure(name: str, args: argparse.Namespace, seed: int) -> dict[str, float] | None:
    """One run in a process of its own; None if it was killed."""
    with args.model.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with limited(int(args.share * args.model.stat().st_size)) as group:
        command = [sys.executable, __file__, str(args.model), "--worker", name, "--group", str(group)]
        numbers = {"--tokens": args.tokens, "--threads": args.threads, "--seed": seed}
        command += [str(word) for pair in numbers.items() for word in pair]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return None
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-800:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def read_ahead(path: Path) -> str:
    """How far the disk of a file reads ahead, for the record."""
    device = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (folder / "queue", folder / ".." / "queue"):
        if (queue / "read_ahead_kb").exists():
            return (queue / "read_ahead_kb").read_text().strip() + " KB"
    return "unknown"


def run(args: argparse.Namespace) -> None:
    """Measure in turn, print medians."""
    killed: set[str] = set()

    def attempt(name: str, number: int) -> dict[str, float] | None:
        """None once the side was killed: it would be killed again."""
        result = None if name in killed else measure(name, args, number)
        if result is None:
            killed.add(name)
        return result

    runs = in_turn({name: partial(attempt, name) for name in SIDES}, args.repeat, n_warm_up=0)
    summary = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, each in runs.items()
        if (found := [run for run in each if run is not None])
    }
    limit = format_size(int(args.share * args.model.stat().st_size))
    show(
        f"{limit} of memory, {args.threads} threads, read-ahead {read_ahead(args.model)}",
        ("", "tokens/s", "prompt", "read/token", "faults", "load"),
        "lrrrrr",
        [cells(title, None if name in killed else summary[name]) for name, title in SIDES.items()],
    )
    ratios = {
        name: summary["ours"]["decode"] / summary[name]["decode"]
        for name in ("default", "mapped")
        if name in summary and "ours" in summary
    }
    for name, ratio in ratios.items():
        print(f"ours / {SIDES[name]}: {ratio:.2f} (bar {BAR})")
    print(json.dumps({"killed": sorted(killed), "ratios": ratios, "bar": BAR, **summary}))


def cells(title: str, found: dict[str, float] | None) -> tuple[str, ...]:
    """A side's row of the table; None for one that was killed."""
    if found is None:
        return title, "killed for memory", "", "", "", ""
    return (
        title,
        f"{found['decode']:.2f}",
        f"{found['prompt']:.1f}",
        format_size(int(found["read_per_token"])),
        f"{found['faults_per_token']:.1f}",
        f"{found['load_seconds']:.1f} s",
    )


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.model, args.group, args.tokens, args.threads, args.seed)
    else:
        run(args)


if __name__ == "__main__":
    main()
