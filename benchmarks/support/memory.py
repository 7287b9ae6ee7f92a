"""Measures the peak memory of processes that generate once: ours, or one with llama.cpp's C functions alone.

The module is run as a program, in a process of its own. It prints JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from benchmarks.support.tools import finished
from dsmoe_local.evaluate.speed.machine import peak_memory

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
_PROMPT, _NEW = 300, 64


def own_peak() -> int:
    """Return the peak memory of this process in bytes. On Linux, ru_maxrss would include the parent's."""
    found = peak_memory(os.getpid())
    assert found is not None
    return found


def measure_ours(path: Path, n_context: int, n_parallel: int, n_threads: int) -> int:
    """Return the peak of this process, which has the client, and of its child, which has the engine."""
    from benchmarks.support.ours import Ours
    from dsmoe_local.engine.types import ModelOptions

    options = ModelOptions(path, n_context=n_context, n_parallel=n_parallel, n_threads=n_threads)
    with Ours(options, ()) as ours:
        ours.replies(_prompts(n_parallel), _NEW, n_parallel, exact=False)
    return own_peak() + _UNIT * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def measure_bare(path: Path, n_context: int, n_parallel: int, n_threads: int) -> int:
    """Return the peak of the same work in bare loops, without the interpreter and the bindings."""
    from benchmarks.support.bare import Bare

    before = own_peak()
    with Bare(path, n_context=n_context, n_sequences=n_parallel, n_threads=n_threads) as bare:
        bare.decode_rate(_prompts(n_parallel), _NEW)
    return own_peak() - before


def _prompts(count: int) -> list[tuple[int, ...]]:
    return [tuple(range(100 + at, 100 + at + _PROMPT)) for at in range(count)]


MEASURES = {"ours": measure_ours, "bare": measure_bare}


def peak_of(who: str, path: Path, *sizes: int) -> int:
    """Measure in a new process. `sizes` are those of the functions above."""
    command = [sys.executable, "-m", "benchmarks.support.memory", who, str(path), *map(str, sizes)]
    peak: int = json.loads(finished(command).splitlines()[-1])
    return peak


if __name__ == "__main__":
    print(MEASURES[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:])))
