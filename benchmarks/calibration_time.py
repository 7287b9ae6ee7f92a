"""How long does calibrated rounding of the 16B take, and how much memory? Extrapolates from a few layers.

    python -m benchmarks.calibration_time                           GPTQ: about 20 minutes on two cores
    python -m benchmarks.calibration_time --rounding learned
    python -m benchmarks.calibration_time --quick                   an eighth of the widths: does it run?

The layers have the full width of DeepSeekMoE 16B, random weights, and random token ids as the text. Neither
changes the time, except that random routers choose experts nearly uniformly. Layer 0 is the dense one. The
last layer computes no hidden states for a next one, so the layers between count for all that have experts.
Reading the text with a tokenizer and writing the file are not timed. Prints a table, bars, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.support.memory import own_peak
from benchmarks.support.quality.bars import at_most
from benchmarks.support.quality.figures import now_and_commit
from benchmarks.support.quality.speed import machine_facts
from benchmarks.support.random_models import model_file, shape_of
from benchmarks.support.tables import show
from dsmoe_local.base.progress import Advanced, Event
from dsmoe_local.base.scratch import scratch_folder
from dsmoe_local.engine.load.machine import physical_cores
from dsmoe_local.model.presets import PRESETS
from dsmoe_quantize.calibrated.calibration import Calibration, Rounding
from dsmoe_quantize.calibrated.calibrator import quantize_calibrated
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import plan_quantization

PRESET = "deepseekmoe-16b"
HOURS = {Rounding.GPTQ: at_most(6), Rounding.LEARNED: at_most(16)}
GIB = {rounding: at_most(12) for rounding in HOURS}
"""Bars for the whole model: hours on two cores, and peak memory."""


class LayerClock:
    """Notes when each layer was finished."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._ends: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Take a progress event."""
        if isinstance(event, Advanced) and event.detail.startswith("layer "):
            self._ends[event.detail] = time.monotonic()
            print(f"\r{event.detail}: {time.monotonic() - self._started:.0f} s", end="", file=sys.stderr)

    def seconds(self) -> list[float]:
        """Return the seconds that each layer took."""
        times = [self._started, *self._ends.values()]
        return [end - start for start, end in pairwise(times)]


def measure(source: Path, out: Path, word: str, calibration: Calibration, threads: int) -> list[float]:
    """Calibrate a file; return the seconds of each layer."""
    clock = LayerClock()
    plan = plan_quantization(source, resolve(word))
    quantize_calibrated(plan, out, calibration, device="cpu", threads=threads, listen=clock)
    return clock.seconds()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--type", default="q4", metavar="T", help="[q4]")
    parser.add_argument("--rounding", type=Rounding, choices=tuple(HOURS), default=Rounding.GPTQ)
    parser.add_argument("--layers", type=int, default=3, metavar="N", help="3 or more [3]")
    parser.add_argument("--tokens", type=int, default=65_536, metavar="N", help="[65,536, as the command]")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N")
    parser.add_argument("--quick", action="store_true", help="an eighth of the widths, 4,096 tokens")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    given = arguments()
    shape = shape_of(PRESET, quick=given.quick)
    n_tokens = 4096 if given.quick else given.tokens
    source = model_file(shape, given.layers, "bf16")
    ids = np.random.default_rng(0).integers(shape.hp.n_vocab, size=(n_tokens // 512, 512), dtype=np.int32)
    calibration = Calibration(ids, "random", "random", given.rounding)
    with scratch_folder("calibration") as folder:
        seconds = measure(source, folder / "out.gguf", given.type, calibration, given.threads)
    print(file=sys.stderr)
    dense, *middle, _ = seconds
    n_layers = PRESETS[PRESET].hp.n_layers
    hours = (dense + statistics.mean(middle) * (n_layers - 1)) / 3600
    peak = own_peak() / 2**30
    words = ["0 (dense)", *map(str, range(1, len(seconds)))]
    lines = [(word, f"{each:.1f}") for word, each in zip(words, seconds, strict=True)]
    lines += [(f"all {n_layers}, extrapolated", f"{hours:.2f} h"), ("peak memory", f"{peak:.2f} GiB")]
    title = f"{given.rounding} of {shape.name} to {given.type}, {n_tokens:,} tokens"
    show(title, ("layer", "seconds"), "lr", lines)
    for what, value, bar in (("hours", hours, HOURS), ("GiB", peak, GIB)):
        if not bar[given.rounding].holds(value):
            print(f"MISSED: {value:.2f} {what}, bar {bar[given.rounding]}")
    settings = {
        "type": given.type,
        "rounding": given.rounding,
        "n_tokens": n_tokens,
        "threads": given.threads,
    }
    told = {"seconds": seconds, "hours": hours, "peak_gib": peak, "shape": shape.name}
    record = {"benchmark": "calibration_time", **now_and_commit(), **machine_facts(), **settings, **told}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
