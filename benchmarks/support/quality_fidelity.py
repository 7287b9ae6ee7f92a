"""How far quantized files of a model are from it: the parts `reference` and `demo` of benchmarks/quality.py.

Everything goes through the functions that `dsmoe convert`, `dsmoe imatrix`, `dsmoe-quantize` and `dsmoe eval`
use. The unquantized model is in F32: kernels of BF16 would round what they multiply with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.support.quality_rows import FidelityRow, Part, TargetRow, is_current
from benchmarks.support.quality_types import BASE, Variant
from benchmarks.support.rows import say
from benchmarks.support.sizes import types_digest
from dsmoe_convert.convert import ConvertOptions, RunOptions, convert_folder
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions, ObserverOptions
from dsmoe_local.evaluate.importance import ACTIVATIONS, collect
from dsmoe_local.evaluate.importance_file import importance_file
from dsmoe_local.evaluate.measure import options_for
from dsmoe_local.evaluate.reference import Reference, compare, record, recorders
from dsmoe_local.evaluate.results import Evaluation
from dsmoe_local.evaluate.text import Text
from dsmoe_local.evaluate.windows import cut_windows
from dsmoe_local.evaluate.workplace import workplace
from dsmoe_local.model.gguf_model import read_model
from dsmoe_local.model.identity import file_identity
from dsmoe_quantize import kernels, sensitivity_file
from dsmoe_quantize.budget import Budget
from dsmoe_quantize.choose import Wishes
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.quantize import Plan, plan_quantization, quantize_file
from dsmoe_quantize.target import Request, solve_target
from dsmoe_quantize.types import resolve

FRONTIER = (4.4, 4.6, 4.8, 5.0, 5.25, 5.5, 6.0, 6.5)
"""Bits per weight that the solver is asked for."""
TARGETS = (0.9, 1.0, 1.1, 1.4)
"""Sizes that it is asked for, as shares of the base's file."""

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint, a text to be measured on, and another for its importance matrix."""

    name: str
    folder: Path
    text: Text
    calibration: Text


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is read, in windows of `n_context` tokens; None: all there is."""

    n_windows: int | None
    n_calibration: int | None
    threads: int
    n_context: int = 512


@dataclass(frozen=True, slots=True)
class Bench:
    """A model that is ready to be quantized and compared with itself."""

    folder: Path
    source: Path
    reference: Reference
    unquantized: Evaluation
    imatrix: Imatrix
    amount: Amount

    def plan(self, variant: Variant) -> Plan:
        """What becomes of the model in that type."""
        imatrix = self.imatrix if variant.imatrix else None
        return plan_quantization(self.source, resolve(variant.word), imatrix=imatrix)

    def measure(self, plan: Plan, variant: Variant, digest: str) -> FidelityRow:
        """Quantize, compare, remove."""
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
        return {
            "model": file_identity(self.source),
            "text": windows.text,
            "text_digest": windows.text_digest,
            "n_context": windows.n_context,
            "n_windows": len(windows.tokens),
            "n_scored": windows.n_scored,
            "imatrix": self.imatrix.digest()[:12],
            "n_calibration": self.imatrix.n_chunks,
            "kernels": kernels.version(),
        }

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
    """As `dsmoe eval` loads it."""
    options = ModelOptions(path, n_threads=amount.threads)
    return EngineClient.load(options_for(options, amount.n_context, *observers))


@contextmanager
def prepared(subject: Subject, amount: Amount) -> Iterator[Bench]:
    """Convert the model, record what it predicts, and collect its importance matrix."""
    with workplace() as folder:
        source = folder / f"{subject.name}.gguf"
        convert_folder(subject.folder, source, ConvertOptions("f32"), RunOptions(threads=amount.threads))
        with load(source, amount, *recorders(folder, source)) as engine:
            windows = cut_windows(engine, subject.text, amount.n_context, amount.n_windows)
            reference, unquantized = record(engine, windows, folder)
        say(f"  unquantized: perplexity {unquantized.perplexity.perplexity.value:.4f}")
        with ExitStack() as stack:
            place = stack.enter_context(importance_file(folder / "importance.gguf"))
            engine = stack.enter_context(load(source, amount, ACTIVATIONS))
            windows = cut_windows(engine, subject.calibration, amount.n_context, amount.n_calibration)
            imatrix = replace(collect(engine, windows, place).imatrix, name=subject.calibration.name)
        yield Bench(folder, source, reference, unquantized, imatrix, amount)


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


def measure_types(
    bench: Bench,
    wanted: Sequence[Variant],
    known: Part | None,
    keep: Callable[[Sequence[FidelityRow]], None],
) -> list[FidelityRow]:
    """A row of each type; those of `known` that are of the same model, text and types are taken from there.
    `keep` is given what there is so far.
    """
    old = known_rows(bench.settings(), known)
    rows: list[FidelityRow] = []
    for variant in wanted:
        row = old.get(variant)
        if row is None:
            row = bench.measure(bench.plan(variant), variant, variant.digest)
            say(f"  {variant}: {told(row)}")
        rows.append(row)
        keep(rows)
    return rows


def known_rows(settings: Mapping[str, Any], known: Part | None) -> dict[Variant, FidelityRow]:
    """What was measured before under the same settings, and is still of the same types."""
    if known is None or dict(known.settings) != dict(settings):
        return {}
    return {Variant(row.type, row.imatrix): row for row in known.rows if is_current(row)}


def told(row: FidelityRow) -> str:
    """A row in a few words."""
    return f"{row.bits_per_weight:.2f} bits, KL {row.kl:.3g} ± {row.kl_error:.1g}"


def measure_frontier(
    bench: Bench, targets: Sequence[float], weights: Mapping[str, float]
) -> list[FidelityRow]:
    """What the solver makes of so many bits per weight, with and without an importance matrix. `weights`:
    what errors cost, by group, where that was measured.
    """
    rows = []
    for imatrix in (False, True):
        for bits in targets:
            variant = Variant(f"{bits:g} bpw", imatrix)
            plan = solved(bench, Budget(bits_per_weight=bits), variant, weights)
            digest = types_digest([change.choice for change in plan.changes])
            rows.append(bench.measure(plan, variant, digest))
            say(f"  {variant}: {told(rows[-1])}")
    return rows


def measure_targets(bench: Bench, shares: Sequence[float], weights: Mapping[str, float]) -> list[TargetRow]:
    """Sizes of files that were to be of a size."""
    base = bench.plan(Variant(BASE, False)).file_size
    found = []
    for share in shares:
        budget = int(share * base)
        plan = solved(bench, Budget(size=budget), Variant(f"{share:g}", False), weights)
        found.append(TargetRow(budget, bench.size_of(plan)))
    return found


def solved(bench: Bench, budget: Budget, variant: Variant, weights: Mapping[str, float]) -> Plan:
    """The solver's best plan within a budget."""
    imatrix = bench.imatrix if variant.imatrix else None
    path = bench.folder / f"sensitivity-{variant.imatrix}.json"
    file, hp = read_model(bench.source)
    if not path.exists():
        start = sensitivity_file.start(file, imatrix, None)
        sensitivity_file.write_sensitivity(replace(start, weights=weights), path)
    request = Request(budget, variant.word.replace(" ", "-"), sensitivity=path)
    return solve_target(file, hp, request, Wishes(), imatrix, threads=bench.amount.threads).solved.plan
