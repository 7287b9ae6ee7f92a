"""How far quantized files of a model are from it: all divergences of benchmarks/quality.py.

Everything goes through the functions that `dsmoe convert`, `dsmoe imatrix`, `dsmoe-quantize` and `dsmoe eval`
use. The unquantized model is in F32, and so is every KV cache: kernels of BF16 would round what they multiply
with, and a cache in F16 would add its own error to what is measured. The unquantized model's predictions are
kept whole: no divergence leaves out a tail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.support.quality_figures import FidelityRow, commit, now
from benchmarks.support.quality_recipes import Variant
from benchmarks.support.runner import say
from benchmarks.support.sizes import types_digest
from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_local.base.durable import write_file
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, ObserverOptions
from dsmoe_local.evaluate.importance import ACTIVATIONS, collect, importance_file
from dsmoe_local.evaluate.measure import options_for
from dsmoe_local.evaluate.reference import Reference, compare, record, recorders
from dsmoe_local.evaluate.results import Evaluation
from dsmoe_local.evaluate.scratch import scratch_folder
from dsmoe_local.evaluate.text import Text
from dsmoe_local.evaluate.windows import cut_windows
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.identity import file_identity
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Overrides
from dsmoe_quantize.policy.types import TypeChoice, resolve
from dsmoe_quantize.quantize import Plan, plan_quantization, quantize_file
from dsmoe_quantize.write import kernels

CACHE = "f32"

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint, a text to be measured on, and another for its importance matrix. `facts` tell more."""

    name: str
    folder: Path
    text: Text
    calibration: Text
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is read, in windows of `n_context` tokens; None: all there is."""

    n_windows: int | None
    n_calibration: int | None
    threads: int
    n_context: int = 512


@dataclass(frozen=True, slots=True)
class Kept:
    """Rows of earlier runs in a folder, one file for each: a run that is interrupted loses nothing. `again`:
    they are not used. `stamps`: when those that were used had been measured.
    """

    folder: Path
    again: bool = False
    stamps: list[str] = field(default_factory=list)

    def row(self, key: Sequence[object], measured: Callable[[], FidelityRow]) -> FidelityRow:
        """The row of that key, measured if need be."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / "rows" / f"{name}.json"
        if path.exists() and not self.again:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.stamps.append(content["stamp"])
            return FidelityRow(**content["row"])
        row = measured()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"stamp": f"{now()}, commit {commit() or 'unknown'}", "row": asdict(row)}
        write_file(path, json.dumps(content).encode())
        return row


@dataclass(frozen=True, slots=True)
class Bench:
    """A model that is ready to be quantized and compared with itself. `imatrix`: None if none is wanted."""

    folder: Path
    source: Path
    reference: Reference
    unquantized: Evaluation
    imatrix: Imatrix | None
    amount: Amount
    kept: Kept

    def plan(self, variant: Variant) -> Plan:
        """What becomes of the model in that type."""
        return self.plan_of(resolve(variant.word), imatrix=variant.imatrix)

    def plan_of(self, choice: TypeChoice, overrides: Overrides | None = None, *, imatrix: bool) -> Plan:
        """What becomes of it in a type that may have no name."""
        return plan_quantization(self.source, choice, overrides, imatrix=self.matrix_if(imatrix))

    def matrix_if(self, wanted: bool) -> Imatrix | None:
        """The importance matrix, if it is wanted."""
        assert self.imatrix is not None or not wanted
        return self.imatrix if wanted else None

    def measure(self, plan: Plan, variant: Variant, digest: str) -> FidelityRow:
        """Quantize, compare, remove; or the row of an earlier run, of the same file and settings."""
        choices = types_digest(plan.choices)
        key = [self.settings(), plan.type.name, variant.imatrix, choices]
        row = self.kept.row(key, lambda: self._compared(plan, variant, digest))
        say(f"  {variant}: {row.bits_per_weight:.2f} bits, KL {row.kl:.3g} ± {row.kl_error:.1g}")
        return replace(row, type=variant.word, digest=digest)

    def _compared(self, plan: Plan, variant: Variant, digest: str) -> FidelityRow:
        path = self._write(plan)
        try:
            observers = self.reference.observers(path)
            with load(path, self.amount, *observers) as engine:
                found = compare(engine, self.reference)
            return row_of(found, plan, variant, digest, path.stat().st_size)
        finally:
            path.unlink()

    def size_of(self, plan: Plan) -> int:
        """Of the file, once written."""
        path = self._write(plan)
        try:
            return path.stat().st_size
        finally:
            path.unlink()

    def _write(self, plan: Plan) -> Path:
        path = self.folder / "quantized.gguf"
        quantize_file(plan, path, threads=self.amount.threads)
        return path

    def settings(self) -> dict[str, Any]:
        """What decides the figures, beside the types."""
        windows = self.reference.windows
        settings = {
            "model": file_identity(self.source),
            "text": windows.text,
            "text_digest": windows.text_digest,
            "n_context": windows.n_context,
            "n_windows": len(windows.tokens),
            "n_scored": windows.n_scored,
            "cache": CACHE,
            "predictions": "whole",
            "kernels": kernels.version(),
        }
        if self.imatrix is None:
            return settings
        matrix = {"imatrix": self.imatrix.digest()[:12], "n_calibration": self.imatrix.n_chunks}
        return {**settings, **matrix}

    def facts(self) -> dict[str, Any]:
        """What else a reader wants to know."""
        found = self.unquantized.perplexity
        file, hp = read_model(self.source)
        return {
            "n_weights": sum(tensor.n_weights for tensor in file.tensors.values()),
            "n_layers": hp.n_layers,
            "perplexity": found.perplexity.value,
            "perplexity_error": found.perplexity.error,
        }


def load(path: Path, amount: Amount, *observers: ObserverOptions) -> EngineClient:
    """As `dsmoe eval` loads it, but for the cache."""
    options = ModelOptions(path, n_threads=amount.threads, cache_type_k=CACHE, cache_type_v=CACHE)
    return EngineClient.load(options_for(options, amount.n_context, *observers))


def exact_recorders(folder: Path, source: Path) -> tuple[ObserverOptions, ...]:
    """As `recorders`, but vocabularies of up to 65,536 tokens are kept whole: 400 KB a token of the demo."""
    predictions, *others = recorders(folder, source)
    kept = {**dict(predictions.parameters), "top": read_model(source)[1].n_vocab, "mass": 1.0}
    return replace(predictions, parameters=tuple(kept.items())), *others


@contextmanager
def prepared(subject: Subject, amount: Amount, kept: Kept, *, imatrix: bool = True) -> Iterator[Bench]:
    """Convert the model, record what it predicts, and collect its importance matrix if it is wanted."""
    with scratch_folder() as folder:
        source = folder / f"{subject.name}.gguf"
        convert_folder(subject.folder, source, ConvertOptions("f32"), RunOptions(threads=amount.threads))
        with load(source, amount, *exact_recorders(folder, source)) as engine:
            windows = cut_windows(engine, subject.text, amount.n_context, amount.n_windows)
            reference, unquantized = record(engine, windows, folder)
        say(f"  unquantized: perplexity {unquantized.perplexity.perplexity.value:.4f}")
        matrix = importance_of(source, subject, amount, folder) if imatrix else None
        yield Bench(folder, source, reference, unquantized, matrix, amount, kept)


def importance_of(source: Path, subject: Subject, amount: Amount, folder: Path) -> Imatrix:
    """What counts, by the calibration text."""
    with ExitStack() as stack:
        place = stack.enter_context(importance_file(folder / "importance.gguf"))
        engine = stack.enter_context(load(source, amount, ACTIVATIONS))
        windows = cut_windows(engine, subject.calibration, amount.n_context, amount.n_calibration)
        return replace(collect(engine, windows, place).imatrix, name=subject.calibration.name)


def row_of(found: Evaluation, plan: Plan, variant: Variant, digest: str, file_size: int) -> FidelityRow:
    """A comparison as a row."""
    assert found.comparison is not None
    divergence, routing = found.comparison.divergence, found.comparison.routing
    assert routing is not None
    perplexity = found.perplexity.perplexity
    return FidelityRow(
        type=variant.word,
        imatrix=variant.imatrix,
        digest=digest,
        file_size=file_size,
        bits_per_weight=plan.bits_per_weight,
        n_bytes_per_token=plan.n_bytes_per_token,
        perplexity=perplexity.value,
        perplexity_error=perplexity.error,
        kl=divergence.kl.value,
        kl_error=divergence.kl.error,
        kl_upper=divergence.kl_upper,
        kl_99=divergence.quantiles["0.99"],
        same_top=divergence.same_top.value,
        same_experts=routing.same,
        overlap=routing.overlap,
        windows=[float(f"{value:.{_DIGITS}g}") for value in divergence.windows],
    )
