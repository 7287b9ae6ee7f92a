"""Conversion and quantization against llama.cpp's tools: seconds and peak memory, in one run.

    python benchmarks/convert.py CHECKPOINT            one of benchmarks/make_checkpoint.py, or a real one
    python benchmarks/convert.py --layers 2            makes a small one first; takes a minute or two
      --llama-cpp DIR --llama-cpp-python PY            also llama.cpp's converter, from a source tree, with a
                                                       Python that has torch, gguf and transformers < 5; it
                                                       takes real tokenizers only: make_checkpoint --tokenizer

Every run is a process of its own. Its inputs are dropped from the page cache before it and everything is
synced, and the time ends when the process does. llama.cpp's quantizer reads our Q8_0 file: 33 GB of bf16 and
all outputs would overfill the disk. Outputs are deleted as soon as they are not needed. A table of seconds,
then one JSON line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.support import arguments
from benchmarks.support.runner import Row, say
from benchmarks.support.tables import report
from dsmoe_local.base.sizes import format_size
from dsmoe_local.engine.load.machine import cpu_name

CONVERT = "from dsmoe_local.cli.main import convert; convert()"
QUANTIZE = "from dsmoe_local.cli.main import quantize; quantize()"
LLAMA_QUANTIZE = """
import ctypes, sys, llama_cpp
silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
parameters.allow_requantize = True
parameters.nthread = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A measured process. `peak_bytes` is its largest resident memory."""

    tool: str
    seconds: float
    cpu_seconds: float
    input_bytes: int
    output_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        rate, output, peak = map(
            format_size, (self.input_bytes / self.seconds, self.output_bytes, self.peak_bytes)
        )
        return f"{self.tool}: {self.cpu_seconds:.1f} s of CPU, {rate}/s read, {output} written, peak {peak}"


def drop_from_cache(paths: Sequence[Path]) -> None:
    """Make the next reader of these files read the disk. Pages must be clean, so they are synced."""
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(tool: str, command: Sequence[object], inputs: Sequence[Path], out: Path) -> Run:
    """Run a command that writes `out`. SystemExit with its last lines if it fails."""
    out.unlink(missing_ok=True)
    drop_from_cache(inputs)
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        child = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()[-4:]
            raise SystemExit("\n".join([f"{tool} failed with status {child.returncode}", *last]))
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    n_input = sum(path.stat().st_size for path in inputs)
    run = Run(tool, seconds, usage.ru_utime + usage.ru_stime, n_input, out.stat().st_size, peak)
    say(f"{seconds:.1f} s: {run}")
    return run


def compare(
    checkpoint: Path, work: Path, threads: int, llama_cpp: Path | None, python: Path
) -> Iterator[Row]:
    """Compare the tools, in an order that keeps few files on the disk at a time."""
    shards = sorted(checkpoint.glob("*.safetensors"))
    eight, out = work / "eight.gguf", work / "out.gguf"
    ours = [sys.executable, "-c", CONVERT, checkpoint, "--threads", threads, "-o"]
    converter = None
    if llama_cpp is not None:
        command = [python, llama_cpp / "convert_hf_to_gguf.py", checkpoint, "--outtype", "q8_0"]
        converter = measure("convert_hf_to_gguf.py", [*command, "--outfile", out], shards, out)
        out.unlink()
    run = measure("dsmoe-convert", [*ours, eight, "--type", "Q8_0"], shards, eight)
    yield _row("checkpoint -> Q8_0", run, converter or run)
    command = [sys.executable, "-c", LLAMA_QUANTIZE, eight, out, threads]
    quantizer = measure("llama_model_quantize", command, [eight], out)
    command = [sys.executable, "-c", QUANTIZE, eight, out, "--type", "Q4_K_M", "--allow-requantize"]
    run = measure("dsmoe-quantize", [*command, "--threads", threads], [eight], out)
    yield _row("Q8_0 -> Q4_K_M", run, quantizer)
    eight.unlink()
    run = measure("dsmoe-convert", [*ours, out, "--type", "Q4_K_M"], shards, out)
    yield _row("checkpoint -> Q4_K_M, one pass", run, quantizer)


def _row(task: str, ours: Run, theirs: Run) -> Row:
    ratio = ours.seconds / theirs.seconds
    return Row(task, ours.seconds, theirs.tool, theirs.seconds, ratio, "s", note=f"{ours}; {theirs}")


def main() -> None:
    """Measure and print."""
    given = arguments.parse(
        __doc__,
        "checkpoint?",
        layers=2,
        work=Path,
        threads=os.cpu_count() or 1,
        llama_cpp=Path,
        llama_cpp_python=Path(sys.executable),
    )
    with tempfile.TemporaryDirectory(prefix="dsmoe-bench-", dir=given.work) as name:
        work, checkpoint = Path(name), given.checkpoint
        if checkpoint is None:
            checkpoint = work / "checkpoint"
            make_checkpoint(checkpoint, layers=given.layers)
        rows = list(compare(checkpoint, work, given.threads, given.llama_cpp, given.llama_cpp_python))
    report(f"Conversion and quantization, {given.threads} threads", rows, {"processor": cpu_name()})


if __name__ == "__main__":
    main()
