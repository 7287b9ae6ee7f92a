"""Conversion and quantization against llama.cpp's tools: seconds, GB/s of input, peak memory, in one run.

    python benchmarks/convert.py CHECKPOINT            one of benchmarks/make_checkpoint.py, or a real one
    python benchmarks/convert.py --layers 2            makes a small one first; takes a minute or two
      --llama-cpp DIR --llama-cpp-python PY            also llama.cpp's converter, from a source tree, with a
                                                       Python that has torch, gguf and transformers < 5; it
                                                       takes real tokenizers only: make_checkpoint --tokenizer

Every run is a process of its own; its inputs are dropped from the page cache before it and everything is
synced, and the time ends when the process does. llama.cpp's quantizer reads our Q8_0 file: 33 GB of bf16 and
all outputs would overfill the disk. Outputs are deleted as soon as they are not needed.
A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.support.tables import show
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
    """One measurement. `peak_bytes` is the ru_maxrss of the largest process; all of these use only one."""

    tool: str
    task: str
    seconds: float
    cpu_seconds: float
    input_bytes: int
    output_bytes: int
    peak_bytes: int

    @property
    def rate(self) -> float:
        """Bytes of input per second."""
        return self.input_bytes / self.seconds


def drop_from_cache(paths: Sequence[Path]) -> None:
    """Make the next reader of these files go to the disk. The pages are clean after a sync: anyone may."""
    os.sync()
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(tool: str, task: str, command: Sequence[str], inputs: Sequence[Path], out: Path) -> Run:
    """Run a command to its end. SystemExit with its last words if it fails."""
    drop_from_cache(inputs)
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()[-4:]
            raise SystemExit("\n".join([f"{tool}: {task} failed with status {child.returncode}", *last]))
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    n_input = sum(path.stat().st_size for path in inputs)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    run = Run(tool, task, round(seconds, 2), round(cpu_seconds, 2), n_input, out.stat().st_size, peak)
    print(f"{tool}: {task}: {seconds:.1f} s, peak memory {format_size(peak)}", file=sys.stderr, flush=True)
    return run


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, and with what."""

    checkpoint: Path
    work: Path
    threads: int
    llama_cpp: Path | None
    llama_cpp_python: Path

    @property
    def shards(self) -> list[Path]:
        """The weights of the checkpoint."""
        return sorted(self.checkpoint.glob("*.safetensors"))

    def ours(self, word: str, out: Path) -> Run:
        """Checkpoint to `word` in one pass."""
        command = [sys.executable, "-c", CONVERT, str(self.checkpoint), "-o", str(out), "--type", word]
        command += ["--threads", str(self.threads), "--force"]
        return measure("dsmoe-convert", f"checkpoint -> {word}", command, self.shards, out)

    def theirs(self, out: Path) -> Run:
        """Checkpoint to Q8_0 by llama.cpp's converter."""
        assert self.llama_cpp is not None
        script = self.llama_cpp / "convert_hf_to_gguf.py"
        command = [str(self.llama_cpp_python), str(script), str(self.checkpoint), "--outtype", "q8_0"]
        command += ["--outfile", str(out)]
        return measure("convert_hf_to_gguf.py", "checkpoint -> Q8_0", command, self.shards, out)

    def quantize(self, source: Path, out: Path) -> Run:
        """Q8_0 to Q4_K_M by our quantizer."""
        command = [sys.executable, "-c", QUANTIZE, str(source), str(out), "--type", "Q4_K_M"]
        command += ["--threads", str(self.threads), "--allow-requantize", "--force"]
        return measure("dsmoe-quantize", "Q8_0 -> Q4_K_M", command, [source], out)

    def llama_quantize(self, source: Path, out: Path) -> Run:
        """Q8_0 to Q4_K_M by llama.cpp's quantizer."""
        command = [sys.executable, "-c", LLAMA_QUANTIZE, str(source), str(out), str(self.threads)]
        return measure("llama_model_quantize", "Q8_0 -> Q4_K_M", command, [source], out)


def measure_all(bench: Bench, also: Sequence[str]) -> list[Run]:
    """All runs, in an order that keeps few files on the disk at a time; `also` one pass to these types."""
    runs: list[Run] = []
    eight, out = bench.work / "eight.gguf", bench.work / "out.gguf"
    if bench.llama_cpp is not None:
        runs.append(bench.theirs(out))
        out.unlink()
    runs.append(bench.ours("Q8_0", eight))
    for quantize in (bench.llama_quantize, bench.quantize):
        runs.append(quantize(eight, out))
        out.unlink()
    eight.unlink()
    for word in ("Q4_K_M", *also):
        runs.append(bench.ours(word, out))
        out.unlink()
    return runs


def ratios(runs: Sequence[Run]) -> dict[str, float]:
    """How the tools compare; above 1, ours is faster, but for one_pass_time."""
    seconds = {(run.tool, run.task): run.seconds for run in runs}
    ours = seconds["dsmoe-convert", "checkpoint -> Q8_0"]
    quantizer = seconds["llama_model_quantize", "Q8_0 -> Q4_K_M"]
    found = {
        "quantizer_speedup": quantizer / seconds["dsmoe-quantize", "Q8_0 -> Q4_K_M"],
        "one_pass_time": seconds["dsmoe-convert", "checkpoint -> Q4_K_M"] / quantizer,
    }
    converter = seconds.get(("convert_hf_to_gguf.py", "checkpoint -> Q8_0"))
    if converter is not None:
        found["converter_speedup"] = converter / ours
    return {name: round(value, 3) for name, value in found.items()}


def report(runs: Sequence[Run], compared: dict[str, float], condition: str) -> None:
    """The table, then the JSON line."""
    rows = [
        (
            run.tool,
            run.task,
            f"{run.seconds:.1f}",
            f"{run.cpu_seconds:.1f}",
            f"{format_size(run.rate)}/s",
            format_size(run.output_bytes),
            format_size(run.peak_bytes),
        )
        for run in runs
    ]
    heads = ("tool", "task", "seconds", "CPU s", "input/s", "output", "peak memory")
    show(f"Conversion and quantization ({condition})", heads, "llrrrrr", rows)
    for name, value in compared.items():
        print(f"{name.replace('_', ' ')}: {value:.2f}")
    record = {
        "benchmark": "convert",
        "machine": {"processor": cpu_name(), "cores": os.cpu_count()},
        "page_cache": condition,
        "runs": [asdict(run) for run in runs],
        **compared,
    }
    print(json.dumps(record))


def main() -> None:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, help="make a checkpoint with this many layers first")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer's folder")
    parser.add_argument("--work", type=Path, help="folder for outputs  [default: the system's own]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--also", metavar="TYPE", action="append", default=[], help="one more type")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--llama-cpp-python", type=Path, default=Path(sys.executable))
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) == (arguments.layers is None):
        parser.error("give a checkpoint, or --layers to make one")
    with tempfile.TemporaryDirectory(prefix="dsmoe-bench-", dir=arguments.work) as name:
        work, checkpoint = Path(name), arguments.checkpoint
        if checkpoint is None:
            checkpoint = work / "checkpoint"
            make_checkpoint(checkpoint, layers=arguments.layers, shards=2, tokenizer=arguments.tokenizer)
        bench = Bench(checkpoint, work, arguments.threads, arguments.llama_cpp, arguments.llama_cpp_python)
        runs = measure_all(bench, arguments.also)
    dropped = hasattr(os, "posix_fadvise")
    report(runs, ratios(runs), "inputs not in the page cache" if dropped else "page cache as it comes")


if __name__ == "__main__":
    main()
