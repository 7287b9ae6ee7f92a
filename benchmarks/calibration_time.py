"""How long does calibrated rounding of the 16B take, and how much memory? Extrapolates from a few layers.

    python -m benchmarks.calibration_time                           GPTQ: about 12 minutes on two cores
    python -m benchmarks.calibration_time --rounding learned        about an hour
    python -m benchmarks.calibration_time --quick                   an eighth of the widths: does it run?

The layers have the full width of DeepSeekMoE 16B, random weights, and random token ids as the text. Neither
changes the time, except that random routers choose experts nearly uniformly. Layer 0 is the dense one. The
last layer computes no hidden states for a next one, so it is not measured: the run stops there. The layers
between count for all that have experts.
Reading the text with a tokenizer and writing the file are not timed. Prints a table, bars, and one JSON line.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.support import arguments
from benchmarks.support.memory import own_peak
from benchmarks.support.quality.bars import at_most
from benchmarks.support.quality.figures import now_and_commit
from benchmarks.support.quality.speed import machine_facts
from benchmarks.support.random_models import model_file, shape_of
from benchmarks.support.tables import show
from dsmoe_local.base.errors import InterruptedRunError
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
GIB = at_most(12)
"""Bars for the whole model: hours on two cores, and peak memory."""


def measure(
    source: Path, out: Path, word: str, calibration: Calibration, threads: int, n_layers: int
) -> list[float]:
    """Calibrate all layers of a file but the last. Return the seconds of each."""
    ends = {"": time.monotonic()}
    stop = threading.Event()

    def note(event: Event) -> None:
        if not isinstance(event, Advanced) or not event.detail.startswith("layer "):
            return
        if event.detail == f"layer {n_layers - 1}":
            stop.set()
        else:
            ends[event.detail] = time.monotonic()

    plan = plan_quantization(source, resolve(word))
    with suppress(InterruptedRunError):
        quantize_calibrated(plan, out, calibration, device="cpu", threads=threads, listen=note, stop=stop)
    return [end - start for start, end in pairwise(ends.values())]


def main() -> None:
    """Measure and print."""
    given = arguments.parse(
        __doc__,
        type="q4",
        rounding=Rounding.GPTQ,
        layers=3,
        tokens=65_536,
        threads=physical_cores(),
        quick=False,
    )
    shape = shape_of(PRESET, quick=given.quick)
    n_tokens = 4096 if given.quick else given.tokens
    source = model_file(shape, given.layers, "bf16")
    ids = np.random.default_rng(0).integers(shape.hp.n_vocab, size=(n_tokens // 512, 512), dtype=np.int32)
    calibration = Calibration(ids, "random", "random", given.rounding)
    with scratch_folder("calibration") as folder:
        seconds = measure(source, folder / "out.gguf", given.type, calibration, given.threads, given.layers)
    dense, *middle = seconds
    n_layers = PRESETS[PRESET].hp.n_layers
    hours = (dense + statistics.mean(middle) * (n_layers - 1)) / 3600
    gigabytes = own_peak() / 2**30
    lines = [(str(layer), f"{each:.1f}") for layer, each in enumerate(seconds)]
    title = f"{given.rounding} of {shape.name} to {given.type}, {n_tokens:,} tokens, {given.threads} threads"
    show(title, ("layer", "seconds"), "lr", lines)
    for value, bar, what in ((hours, HOURS[given.rounding], "hours"), (gigabytes, GIB, "GiB of memory")):
        print(f"all {n_layers} layers: {value:.2f} {what}, bar {bar}{'' if bar.holds(value) else ', MISSED'}")
    settings = {"type": given.type, "rounding": given.rounding, "n_tokens": n_tokens}
    told = {"seconds": seconds, "hours": hours, "peak_gib": gigabytes, "shape": shape.name}
    print(json.dumps({**now_and_commit(), **machine_facts(), **settings, "threads": given.threads, **told}))


if __name__ == "__main__":
    main()
