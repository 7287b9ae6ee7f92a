"""Types rounded on a calibration text, for benchmarks/quality.py and benchmarks/rounding.py."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.quality.fidelity import Bench, Subject, load
from benchmarks.support.quality.figures import FidelityRow
from benchmarks.support.quality.variants import CALIBRATED, Variant
from dsmoe_local.evaluate.windows import cut_windows
from dsmoe_quantize.calibrated.calibration import Calibration, Rounding


def calibration_windows(bench: Bench, subject: Subject) -> NDArray[np.int32]:
    """Return the token ids of the whole calibration text, one window in each row."""
    with load(bench.source, bench.amount) as engine:
        return np.array(cut_windows(engine, subject.calibration, bench.amount.n_context).tokens, np.int32)


def calibration_of(
    windows: NDArray[np.int32], subject: Subject, n_windows: int | None, rounding: Rounding, seed: int
) -> Calibration:
    """Return a calibration on windows that `seed` chooses."""
    chosen = np.random.default_rng(seed).permutation(len(windows))[:n_windows]
    text = subject.calibration
    return Calibration(windows[chosen], text.name, text.digest, rounding, seed)


def measure_calibrated(bench: Bench, subject: Subject) -> list[FidelityRow]:
    """Measure types rounded with GPTQ."""
    windows = calibration_windows(bench, subject)
    calibration = calibration_of(windows, subject, bench.amount.n_calibration, Rounding.GPTQ, 0)
    wanted = [Variant(word, True) for word in CALIBRATED]
    return [bench.measure(bench.plan(each), each, each.digest, calibration) for each in wanted]
