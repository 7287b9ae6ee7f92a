"""Does the predicted error predict? What `dsmoe-quantize --target-*` expects of a type, beside what it is.

    dsmoe eval model-BF16.gguf --text TEXT --sensitivity costs.json
    python -m benchmarks.predicted_error model-BF16.gguf --text TEXT --sensitivity costs.json
    python -m benchmarks.predicted_error model-BF16.gguf --text TEXT              from the built-in costs

Each type is quantized, compared with the model, and removed. Prints a table, then one JSON line with what the
figures depend on. The windows should be those that the costs were measured on, or more.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.support.tables import show
from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.scratch import scratch_folder
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.evaluate.measure import options_for
from dsmoe_local.evaluate.reference import Reference, compare, record, recorders
from dsmoe_local.evaluate.text import read_text
from dsmoe_local.evaluate.windows import cut_windows
from dsmoe_local.model.gguf_model import read_model
from dsmoe_quantize.budget import sensitivity_file
from dsmoe_quantize.budget.cost_model import Budget, CostModel
from dsmoe_quantize.budget.sensitivity import Sensitivity, measure
from dsmoe_quantize.imatrix import Imatrix
from dsmoe_quantize.imatrix_file import read_imatrix
from dsmoe_quantize.policy.types import resolve
from dsmoe_quantize.quantize import Plan, plan_file, quantize_file

TYPES = ("Q4_0", "Q4_K_S", "Q4_K_M", "IQ4_XS", "Q5_K_M", "q4", "4.6", "5.2")
N_CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One type: the divergence predicted and measured, in nats, and the standard error of the latter."""

    type: str
    bits_per_weight: float
    predicted: float
    measured: float
    measured_error: float

    @property
    def ratio(self) -> float | None:
        """Predicted by measured; None where one of them is nothing."""
        return self.predicted / self.measured if min(self.predicted, self.measured) > 0 else None

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        return (
            self.type,
            f"{self.bits_per_weight:.2f}",
            f"{self.predicted:.3g}",
            f"{self.measured:.3g}",
            f"{self.measured_error:.1g}",
            "-" if self.ratio is None else f"{self.ratio:.2f}",
        )

    def as_json(self) -> dict[str, object]:
        """For the line at the end."""
        return {
            "type": self.type,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "predicted": float(f"{self.predicted:.4g}"),
            "measured": float(f"{self.measured:.4g}"),
            "measured_error": float(f"{self.measured_error:.2g}"),
            "ratio": None if self.ratio is None else round(self.ratio, 3),
        }


class Bench:
    """A model, its reference predictions, and what predicts."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._folder = folder
        self._path: Path = options.model
        self._threads: int = options.threads
        self._imatrix: Imatrix | None = read_imatrix(options.imatrix) if options.imatrix else None
        self.file, self.hp = read_model(self._path)
        self.costs = CostModel(self.file, self.hp, self._sensitivity(options), imatrix=self._imatrix)
        self._reference = self._recorded(options)

    def settings(self) -> dict[str, object]:
        """What the figures depend on, beside the model."""
        windows, imatrix = self._reference.windows, self._imatrix
        return {
            "text": windows.text,
            "text_digest": windows.text_digest,
            "n_context": windows.n_context,
            "n_windows": len(windows.tokens),
            "costs": str(self.costs.error_weights),
            "share_of_weights_tried": round(self.costs.sensitivity.share, 4),
            "imatrix": imatrix and {"file": imatrix.name, "digest": imatrix.digest()[:16]},
            "kernels": self.costs.sensitivity.kernels,
        }

    def row(self, word: str) -> Row:
        """One type, or a target in bits per weight."""
        plan = self._plan(word)
        path = self._folder / "quantized.gguf"
        quantize_file(plan, path, threads=self._threads)
        observers = self._reference.observers(path)
        with EngineClient.load(options_for(self._model(path), N_CONTEXT, *observers)) as engine:
            found = compare(engine, self._reference).comparison
        path.unlink()
        assert found is not None
        kl = found.divergence.kl
        predicted = self.costs.figures(plan.choices).error
        return Row(plan.type.name, plan.bits_per_weight, predicted, kl.value, kl.error)

    def _plan(self, word: str) -> Plan:
        if not word.replace(".", "").isdigit():
            return plan_file(self.file, self.hp, resolve(word), imatrix=self._imatrix)
        return self.costs.solve(Budget(bits_per_weight=float(word)), f"{word}bpw").plan

    def _sensitivity(self, options: argparse.Namespace) -> Sensitivity:
        wanted = sensitivity_file.start(self.file, self._imatrix, None)
        if options.sensitivity:
            if not options.sensitivity.exists():
                raise UsageError("there is no such sensitivity file", where=options.sensitivity)
            wanted = sensitivity_file.resume(options.sensitivity, wanted, any_sample=True)
        found = measure(self.file, wanted, self._imatrix, threads=self._threads)
        return replace(found, weights={}) if options.built_in else found

    def _model(self, path: Path) -> ModelOptions:
        return ModelOptions(path, n_threads=self._threads or None)

    def _recorded(self, options: argparse.Namespace) -> Reference:
        observers = recorders(self._folder, self._path)
        with EngineClient.load(options_for(self._model(self._path), N_CONTEXT, *observers)) as engine:
            windows = cut_windows(engine, read_text(options.text), N_CONTEXT, options.chunks)
            reference = record(engine, windows, self._folder)[0]
        return replace(reference, routers=None)


def rank_correlation(rows: Sequence[Row]) -> float | None:
    """Spearman's, of predicted and measured: 1 if types are put in the right order. None of a single one."""
    predicted, measured = (
        np.argsort(np.argsort([getattr(row, name) for row in rows])) for name in ("predicted", "measured")
    )
    return round(float(np.corrcoef(predicted, measured)[0, 1]), 4) if len(rows) > 1 else None


def mean_log_ratio(rows: Sequence[Row]) -> float | None:
    """0 if predictions are neither too high nor too low on the whole. None if no row has a ratio."""
    logs = [math.log(row.ratio) for row in rows if row.ratio is not None]
    return round(sum(logs) / len(logs), 4) if logs else None


def main() -> int:
    """Measure and print."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="unquantized")
    parser.add_argument("--text", metavar="FILE")
    parser.add_argument("--sensitivity", type=Path, metavar="FILE")
    parser.add_argument(
        "--built-in", action="store_true", help="predict from the built-in costs nevertheless"
    )
    parser.add_argument("--imatrix", type=Path, metavar="FILE")
    parser.add_argument("--types", default=",".join(TYPES), help="types, or targets in bits per weight")
    parser.add_argument("--chunks", type=int, metavar="N")
    parser.add_argument("--threads", type=int, default=0, metavar="N")
    options = parser.parse_args()
    rows = []
    try:
        with scratch_folder("eval") as folder:
            bench = Bench(options, folder)
            for word in options.types.split(","):
                rows.append(bench.row(word))
                print(f"{rows[-1].type}: {rows[-1].measured:.4g}", file=sys.stderr)
    except DsmoeError as error:
        parser.exit(error.exit_code, f"{error}\n")
    heads = ("type", "bits per weight", "predicted", "measured", "± s.e.", "ratio")
    show("Mean KL divergence, nats", heads, "lrrrrr", [row.cells() for row in rows])
    result = {
        "benchmark": "predicted_error",
        "model": options.model.stem,
        "settings": bench.settings(),
        "rank_correlation": rank_correlation(rows),
        "mean_log_ratio": mean_log_ratio(rows),
        "rows": [row.as_json() for row in rows],
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
