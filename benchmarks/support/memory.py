"""Peak memory of a process that generates once: ours with its child, or llama.cpp's C functions alone.

Run as a program, in a process of its own; the last line it prints is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_LINUX_STATUS = Path("/proc/self/status")
_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
_PROMPT, _NEW = 300, 64


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes resident at most, mappings included. `before`: what there was before llama.cpp did anything."""

    peak: int
    before: int


def own_peak() -> int:
    """This process's peak. Not ru_maxrss on Linux: a process inherits its starter's there."""
    if _LINUX_STATUS.exists():
        return 1024 * int(_LINUX_STATUS.read_text().split("VmHWM:")[1].split()[0])
    return _UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def children_peak() -> int:
    """The peak of the largest child that has ended."""
    return _UNIT * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def measure_ours(path: Path, n_context: int, n_parallel: int, n_threads: int) -> Peak:
    """The process tree: this one holds the client, its child the engine."""
    from benchmarks.support.ours import Ours
    from dsmoe_local.engine.types import ModelOptions

    options = ModelOptions(path, n_context=n_context, n_parallel=n_parallel, n_threads=n_threads)
    with Ours(options, ()) as ours:
        ours.replies([_ids(at) for at in range(n_parallel)], _NEW, n_parallel, exact=False)
    return Peak(own_peak() + children_peak(), 0)


def measure_bare(path: Path, n_context: int, n_parallel: int, n_threads: int) -> Peak:
    """The same work in bare loops; the interpreter and the bindings are there before."""
    from benchmarks.support.bare import Bare

    before = own_peak()
    with Bare(path, n_context=n_context, n_sequences=n_parallel, n_threads=n_threads) as bare:
        bare.decode_rate([_ids(at) for at in range(n_parallel)], _NEW)
    return Peak(own_peak(), before)


def _ids(seed: int) -> tuple[int, ...]:
    return tuple(range(100 + seed, 100 + seed + _PROMPT))


MEASURES = {"ours": measure_ours, "bare": measure_bare}


def peak_of(who: str, path: Path, n_context: int, n_parallel: int, n_threads: int) -> Peak:
    """Measure in a process of its own."""
    numbers = (str(number) for number in (n_context, n_parallel, n_threads))
    command = [sys.executable, "-m", "benchmarks.support.memory", who, str(path), *numbers]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the memory measurement failed: {done.stderr[-600:]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The command line of the measuring process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("who", choices=list(MEASURES))
    parser.add_argument("path", type=Path)
    for name in ("n_context", "n_parallel", "n_threads"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    peak = MEASURES[given.who](given.path, given.n_context, given.n_parallel, given.n_threads)
    print(json.dumps({"peak": peak.peak, "before": peak.before}))


if __name__ == "__main__":
    main()
