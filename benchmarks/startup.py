"""Two waits a user feels: `dsmoe --help`, and reading the header of a file with the 16B's vocabulary.

    python benchmarks/startup.py

The vocabulary is synthetic (102,400 tokens, 100,000 merges, no tensors); the `gguf` package's reader is
measured beside ours.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
from gguf.constants import GGUFValueType

from dsmoe_local.model.gguf_file import Field, read_gguf
from dsmoe_local.model.gguf_writer import plan_gguf

RUNS = 11


def median_seconds(work: Callable[[], object], runs: int = RUNS) -> float:
    """The median wall time of `work`, after one run that does not count."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def vocabulary_file(folder: Path) -> Path:
    """A GGUF file that holds nothing but a vocabulary of the 16B's size."""

    def words(count: int, form: str) -> Field:
        return Field([form.format(n) for n in range(count)], GGUFValueType.ARRAY, GGUFValueType.STRING)

    metadata = {
        "general.architecture": Field("deepseek", GGUFValueType.STRING),
        "tokenizer.ggml.tokens": words(102_400, "token{}"),
        "tokenizer.ggml.token_type": Field([1] * 102_400, GGUFValueType.ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.merges": words(100_000, "tok en{}"),
    }
    path = folder / "vocabulary.gguf"
    path.write_bytes(plan_gguf(metadata, []).header)
    return path


def main() -> None:
    """Print a table, then one JSON line."""
    dsmoe = str(Path(sys.executable).with_name("dsmoe"))
    with tempfile.TemporaryDirectory() as folder:
        path = vocabulary_file(Path(folder))
        rows = {
            "dsmoe --help": median_seconds(
                lambda: subprocess.run([dsmoe, "--help"], check=True, capture_output=True)
            ),
            "python -c pass": median_seconds(
                lambda: subprocess.run([sys.executable, "-c", "pass"], check=True, capture_output=True)
            ),
            "header of 102,400 tokens, ours": median_seconds(lambda: read_gguf(path)),
            "header of 102,400 tokens, gguf package": median_seconds(lambda: gguf.GGUFReader(path), runs=1),
        }
    for name, seconds in rows.items():
        print(f"{name:<40} {seconds:7.3f} s")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
