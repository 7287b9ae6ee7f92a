"""Compares quantized files of a model with the unquantized one: all divergences of benchmarks/quality.py.

Everything goes through the functions that `dsmoe convert`, `dsmoe imatrix`, `dsmoe-quantize` and `dsmoe eval`
use. The unquantized model and every KV cache are in F32: kernels for BF16 round the activations, and a cache
in F16 would add its own error. The unquantized model's predictions are complete: divergences are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.support.quality.figures import FidelityRow
from benchmarks.support.quality.variants import Variant
from benchmarks.support.runner import say
from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_local.base.scratch import scratch_folder
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, ObserverOptions
from dsmoe_local.evaluate.importance import ACTIVATIONS, collect, importance_file
from dsmoe_local.evaluate.measure import options_for
from dsmoe_local.evaluate.reference import Reference, compare, record, recorders
from dsmoe_local.evaluate.results import Evaluation
from dsmoe_local.evaluate.text import Text
from dsmoe_local.evaluate.windows import cut_windows
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.identity import file_identity
from dsmoe_quantize.calibrated.calibration import Calibration
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.policy.choice import Overrides
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import Plan, plan_quantization, quantize_file
from dsmoe_quantize.write import kernels

CACHE = "f32"

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint, a text to measure it on, and another for its importance matrix. `facts` are shown."""

    name: str
    folder: Path
    text: Text
    calibration: Text
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Amount:
    """How much text is read, in windows of `n_context` tokens; None for all of it."""

    n_windows: int | None
    n_calibration: int | None
    threads: int
    n_context: int = 512


@dataclass(frozen=True, slots=True)
class Bench:
    """A model that is ready to be quantized and compared. `imatrix` is None if none is wanted."""

    folder: Path
    source: Path
    reference: Reference
    unquantized: Evaluation
    imatrix: Imatrix | None
    amount: Amount

    def plan(self, variant: Variant, overrides: Overrides | None = None) -> Plan:
        """Return the plan for the model in a type."""
        imatrix = self.matrix_if(variant.imatrix)
        return plan_quantization(self.source, resolve(variant.word), overrides, imatrix=imatrix)

    def matrix_if(self, wanted: bool) -> Imatrix | None:
        """Return the importance matrix if `wanted`, else None."""
        assert self.imatrix is not None or not wanted
        return self.imatrix if wanted else None

    def measure(
        self, plan: Plan, variant: Variant, digest: str = "", calibration: Calibration | None = None
    ) -> FidelityRow:
        """Quantize the model, compare the file with it, and remove the file."""
        path = self.folder / "quantized.gguf"
        if calibration is None:
            quantize_file(plan, path, threads=self.amount.threads)
        else:
            from dsmoe_quantize.calibrated.calibrator import quantize_calibrated  # needs torch

            quantize_calibrated(plan, path, calibration, device="cpu", threads=self.amount.threads)
        try:
            with load(path, self.amount, *self.reference.observers(path)) as engine:
                found = compare(engine, self.reference)
            row = row_of(found, plan, variant, digest, path.stat().st_size)
        finally:
            path.unlink()
        say(f"  {variant}: {row.bits_per_weight:.2f} bits, KL {row.kl:.3g} ± {row.kl_error:.1g}")
        return row

    def settings(self) -> dict[str, Any]:
        """Return what determines the figures, apart from the types."""
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
        """Return what a reader wants to know about the model."""
        found = self.unquantized.perplexity
        file, hp = read_model(self.source)
        return {
            "n_weights": sum(tensor.n_weights for tensor in file.tensors.values()),
            "n_layers": hp.n_layers,
            "perplexity": found.perplexity.value,
            "perplexity_error": found.perplexity.error,
        }


def load(path: Path, amount: Amount, *observers: ObserverOptions) -> EngineClient:
    """Load a model as `dsmoe eval` does, but with a KV cache in F32, and one window in each ubatch.

    If several windows shared a ubatch, which ones would depend on timing, and so would the last digits.
    """
    options = ModelOptions(
        path,
        n_threads=amount.threads,
        n_ubatch=amount.n_context,
        cache_type_k=CACHE,
        cache_type_v=CACHE,
    )
    return EngineClient.load(options_for(options, amount.n_context, *observers))


def exact_recorders(folder: Path, source: Path) -> tuple[ObserverOptions, ...]:
    """Return the recorders of a reference with complete predictions: 400 KB for each token of the demo."""
    predictions, *others = recorders(folder, source)
    kept = {**dict(predictions.parameters), "top": read_model(source)[1].n_vocab, "mass": 1.0}
    return replace(predictions, parameters=tuple(kept.items())), *others


@contextmanager
def prepared(subject: Subject, amount: Amount, *, imatrix: bool = True) -> Iterator[Bench]:
    """Convert the model, record its predictions, and collect its importance matrix if it is wanted."""
    with scratch_folder("eval") as folder:
        source = folder / f"{subject.name}.gguf"
        convert_folder(subject.folder, source, ConvertOptions("f32"), RunOptions(threads=amount.threads))
        with load(source, amount, *exact_recorders(folder, source)) as engine:
            windows = cut_windows(engine, subject.text, amount.n_context, amount.n_windows)
            reference, unquantized = record(engine, windows, folder)
        say(f"  unquantized: perplexity {unquantized.perplexity.perplexity.value:.4f}")
        matrix = importance_of(source, subject, amount, folder) if imatrix else None
        yield Bench(folder, source, reference, unquantized, matrix, amount)


def importance_of(source: Path, subject: Subject, amount: Amount, folder: Path) -> Imatrix:
    """Collect the importance matrix on the calibration text."""
    with ExitStack() as stack:
        place = stack.enter_context(importance_file(folder / "importance.gguf"))
        engine = stack.enter_context(load(source, amount, ACTIVATIONS))
        windows = cut_windows(engine, subject.calibration, amount.n_context, amount.n_calibration)
        return replace(collect(engine, windows, place).imatrix, name=subject.calibration.name)


def row_of(found: Evaluation, plan: Plan, variant: Variant, digest: str, file_size: int) -> FidelityRow:
    """Return a comparison as a row."""
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
