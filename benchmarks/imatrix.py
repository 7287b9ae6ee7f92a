"""How fast is `dsmoe imatrix`, and does it see what `llama-imatrix` sees? Both read the same text in turn.

    python -m benchmarks.imatrix MODEL.gguf --llama-cpp BUILD [--text FILE] [--chunks 16] [--rounds 3]
    python -m benchmarks.imatrix MODEL.gguf --llama-cpp BUILD --encode     also: quantizing with a matrix

Same windows, same threads. The time is that of the reading alone: ours is what the command says of itself,
files kept on the way and the last one included; theirs goes from its line that the windows begin to the line
with the perplexity, its last file left out. Then the two files are compared, expert by expert: the channels'
mean squares, |ours - theirs| summed over all in parts per million of theirs; and the counts.

--encode takes the processor's time of `dsmoe-quantize` and `llama-quantize`, whole processes, to each type
alone (--pure), without the matrix and with it, and how much longer ours takes with it. Table, then one JSON
line; exit status 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.runner import Bar, Row, compare, in_turn, say
from benchmarks.support.tables import report
from benchmarks.support.tools import Failure, find_program, finished
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.evaluate.speed.machine import cpu_name
from dsmoe_local.evaluate.text import read_text
from dsmoe_quantize.imatrix import Imatrix, Statistics
from dsmoe_quantize.imatrix_file import read_imatrix

READING = Bar(0.7)
SAME = Bar(100, at_most=True)
ENCODING = Bar(1.1, at_most=True)
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS")

Command = list[str | Path]

_PER_MILLION = 1e6
_BEGINS, _ENDS = "computing over", "Final estimate"


@dataclass(frozen=True, slots=True)
class Bench:
    """What is read, with what, and where the files go."""

    model: Path
    text: Path
    build: Path
    folder: Path
    n_chunks: int
    n_context: int
    n_threads: int

    @property
    def files(self) -> Mapping[str, Path]:
        """The matrices, ours and theirs."""
        return {name: self.folder / f"{name}.imatrix.gguf" for name in ("ours", "theirs")}

    def ours(self, _: int = 0) -> float:
        """Tokens a second of `dsmoe imatrix`."""
        command: Command = [_program("dsmoe"), "imatrix", self.model, "--text", self.text]
        command += ["--json", "--force", "-o", self.files["ours"], "-c", str(self.n_context)]
        command += ["--chunks", str(self.n_chunks), "-t", str(self.n_threads)]
        said = json.loads(finished(command).stdout)
        if said["n_windows"] != self.n_chunks:
            raise Failure(f"the text fills {said['n_windows']} windows: use --chunks, or a longer --text")
        return float(said["tokens_per_second"])

    def theirs(self, _: int = 0) -> float:
        """Tokens a second of `llama-imatrix`."""
        program = find_program(self.build, "llama-imatrix")
        command: Command = [program, "-m", self.model, "-f", self.text, "-o", self.files["theirs"]]
        command += ["-c", str(self.n_context), "--chunks", str(self.n_chunks), "-t", str(self.n_threads)]
        times: dict[str, float] = {}
        lines: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                lines.append(line)
                times |= {word: time.perf_counter() for word in (_BEGINS, _ENDS) if word in line}
        if child.returncode or len(times) < 2:
            raise Failure(f"llama-imatrix failed: {''.join(lines)[-600:]}")
        return self.n_chunks * self.n_context / (times[_ENDS] - times[_BEGINS])


def _program(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def differences(ours: Imatrix, theirs: Imatrix) -> list[Row]:
    """How far the two matrices are from each other at the worst expert, and at the worst count."""
    if set(ours.entries) != set(theirs.entries):
        odd = sorted(set(ours.entries) ^ set(theirs.entries))
        raise Failure(f"not the same tensors: {', '.join(odd[:6])}")
    squares: dict[str, float] = {}
    counts: dict[str, float] = {}
    for name, entry in ours.entries.items():
        other = theirs.entries[name]
        if len(entry.counts) != len(other.counts):
            raise Failure(f"{name}: {len(entry.counts)} and {len(other.counts)} counts")
        counts[name] = float(np.abs(entry.counts - other.counts).max())
        seen = (entry.counts > 0) & (other.counts > 0)
        first, second = _means(entry)[seen], _means(other)[seen]
        shares = np.abs(first - second).sum(1) / second.sum(1)
        squares[name] = _PER_MILLION * float(shares.max(initial=0.0))
    return [
        _worst("mean squares, worst expert", squares, "ppm", SAME),
        _worst("counts, worst expert", counts, "tokens", None),
    ]


def _means(entry: Statistics) -> NDArray[np.float64]:
    sums = entry.sums.reshape(len(entry.counts), -1).astype(np.float64)
    return sums / np.maximum(entry.counts, 1)[:, None]


def _worst(measure: str, found: Mapping[str, float], unit: str, bar: Bar | None) -> Row:
    name = max(found, key=lambda name: found[name])
    return Row(measure, found[name], "llama-imatrix", 0.0, found[name], unit, bar, name, is_difference=True)


def encoding(bench: Bench, rounds: int) -> list[Row]:
    """Processor seconds of both quantizers to each type, with our matrix and without one."""
    rows = []
    for kind in TYPES:
        ours: dict[str, list[float]] = {}
        for matrix in (None, bench.files["ours"]):
            commands = _quantizers(bench, kind, matrix)
            name = f"{kind} {'with' if matrix else 'without'} a matrix"
            say(f"encoding as {name}")
            timers = {who: partial(_processor_seconds, command) for who, command in commands.items()}
            figures = in_turn(timers, rounds)
            bar = ENCODING if matrix else None
            rows.append(compare(f"encoding, {name}", figures, *figures, bar=bar, unit="CPU s"))
            ours["with" if matrix else "without"] = figures["dsmoe-quantize"]
        rows.append(compare(f"{kind}, with by without a matrix", ours, "with", "without", unit="CPU s"))
    return rows


def _quantizers(bench: Bench, kind: str, matrix: Path | None) -> dict[str, Command]:
    out, threads = bench.folder / "encoded.gguf", str(bench.n_threads)
    given: Command = ["--imatrix", matrix] if matrix else []
    ours: Command = [_program("dsmoe-quantize"), bench.model, out, "--type", kind, "--threads", threads]
    theirs: Command = [
        find_program(bench.build, "llama-quantize"),
        "--allow-requantize",
        "--pure",
        *given,
        bench.model,
        out,
    ]
    return {
        "dsmoe-quantize": [*ours, *given, "--pure", "--allow-requantize", "--force"],
        "llama-quantize": [*theirs, kind, threads],
    }


def _processor_seconds(command: Command, _: int) -> float:
    """Of a whole process, all threads together: what else the machine does hardly changes it."""
    before = _of_children()
    finished(command)
    return _of_children() - before


def _of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(bench: Bench, arguments: argparse.Namespace) -> list[Row]:
    """All rows."""
    say(f"reading {bench.n_chunks} windows of {bench.n_context} tokens")
    figures = in_turn({"dsmoe imatrix": bench.ours, "llama-imatrix": bench.theirs}, arguments.rounds)
    rows = [compare("reading", figures, *figures, bar=READING)]
    rows += differences(*(read_imatrix(path) for path in bench.files.values()))
    return rows + (encoding(bench, arguments.rounds) if arguments.encode else [])


def main() -> int:
    """Measure, print; 1 if a bar is missed."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="its build folder")
    parser.add_argument("--text", help="what to read  [default: the built-in text]")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encode", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsmoe-imatrix-") as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text(read_text(arguments.text).content, encoding="utf-8")
        model, build = arguments.model.resolve(), arguments.llama_cpp
        bench = Bench(model, text, build, folder, arguments.chunks, arguments.context, arguments.threads)
        rows = measure(bench, arguments)
    machine = {"processor": cpu_name(), "cores": os.cpu_count()}
    settings = {name: getattr(arguments, name) for name in ("chunks", "context", "threads", "rounds")}
    record = {"benchmark": "imatrix", "model": bench.model.name, "machine": machine, **settings}
    report(f"{model.name}, {bench.n_threads} threads, median of {arguments.rounds} rounds", rows, record)
    return 1 if any(row.passed is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
