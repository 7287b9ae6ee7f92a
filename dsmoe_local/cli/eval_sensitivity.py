"""`dsmoe eval --sensitivity`: options, run and table. `evaluate.error_cost` measures."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.option_sources import flag_of, from_command_line
from dsmoe_local.cli.options import FILE, FLAG, Group, all_of, option, text_value
from dsmoe_local.cli.output import built_in_text, console, plain_table, print_json
from dsmoe_local.cli.progress import run_with_progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from dsmoe_local.base.progress import Listener
    from dsmoe_local.engine.interface import TextEngine
    from dsmoe_local.engine.process.client import EngineClient
    from dsmoe_local.engine.types import ObserverOptions
    from dsmoe_local.evaluate.error_cost import ErrorCosts, Load
    from dsmoe_local.evaluate.text import Text
    from dsmoe_local.model.ggml import GgmlType

_PROBE = "q4_0"
_NO_FIT = "none fits"
_WIDE = 76
"""The least columns for the whole table."""

_SENSITIVITY = Group.SENSITIVITY

sensitivity_options = all_of(
    option(
        "--sensitivity",
        "sensitivity_file",
        "Measure what errors in each group of tensors cost, and store it for dsmoe quantize.",
        FILE,
        _SENSITIVITY,
        section_only=True,
        # At the top level of the config file, and as DSMOE_SENSITIVITY, it is what dsmoe quantize reads. Here
        # it starts hours of measuring.
        envvar="DSMOE_EVAL_SENSITIVITY",
    ),
    option(
        "--probe",
        "probes",
        "Type to quantize each group to. Repeatable; the results are averaged.",
        text_value("TYPE"),
        _SENSITIVITY,
        multiple=True,
        shown=_PROBE,
    ),
    option("--by-layer", "by_layer", "Measure each group in each layer separately.", FLAG, _SENSITIVITY),
    option(
        "--imatrix",
        "imatrix_file",
        "Quantize with this importance matrix, as dsmoe quantize will.",
        FILE,
        _SENSITIVITY,
    ),
    option(
        "--allow-requantize",
        "allow_requantize",
        "Accept a model that is already quantized.",
        FLAG,
        _SENSITIVITY,
    ),
)
"""Adds the options of `SensitivityOptions`."""

_NEEDS_SENSITIVITY = ("probes", "by_layer", "imatrix_file", "allow_requantize")
_MODEL_CHANGES = {"n_experts_per_token": None, "cache_type_k": "f16", "cache_type_v": "f16"}
"""Options whose effect on MODEL can be measured, with the values that change nothing."""


def without_model_changes(values: dict[str, Any]) -> dict[str, Any]:
    """Return the shared options for the reference: without those whose effect is measured."""
    return values | _MODEL_CHANGES


@dataclass(frozen=True, slots=True)
class SensitivityOptions:
    """The values of the options about sensitivity."""

    sensitivity_file: Path | None
    probes: tuple[str, ...]
    by_layer: bool
    imatrix_file: Path | None
    allow_requantize: bool

    @classmethod
    def taken(cls, values: dict[str, Any]) -> SensitivityOptions:
        """Remove them from the parameters of the command."""
        return cls(**{each.name: values.pop(each.name) for each in fields(cls)})

    def check(self) -> None:
        """Raise UsageError for options on the command line that have no effect."""
        if self.sensitivity_file is None:
            for name in _NEEDS_SENSITIVITY:
                if getattr(self, name) and from_command_line(name):
                    raise UsageError(f"{flag_of(name)} needs --sensitivity")
            return
        for name in _MODEL_CHANGES:
            if from_command_line(name):
                raise UsageError(f"{flag_of(name)} has no effect with --sensitivity", remedy="leave it out")

    def types(self) -> tuple[GgmlType, ...]:
        """Return the types to try. UsageError for an unknown or unsuitable one."""
        from dsmoe_local.model.ggml import FLOATS
        from dsmoe_quantize.policy.types import parse_target

        types = tuple(dict.fromkeys(parse_target(word) for word in self.probes or (_PROBE,)))
        if FLOATS.intersection(types):
            raise UsageError("--probe takes a quantized type", remedy=f"such as {_PROBE}")
        return types


def run(
    path: Path,
    options: SensitivityOptions,
    text: Text,
    n_context: int,
    n_windows: int | None,
    values: dict[str, Any],
) -> ErrorCosts:
    """Measure the model at `path`; `values` are the shared options."""
    from dsmoe_local.evaluate.error_cost import CostOptions, measure_costs
    from dsmoe_local.model.discovery import note_use
    from dsmoe_local.model.gguf_model import read_model
    from dsmoe_quantize.budget.target import refuse_quantized
    from dsmoe_quantize.imatrix_file import read_imatrix

    assert options.sensitivity_file is not None
    wanted = CostOptions(
        options.sensitivity_file,
        text,
        n_context,
        n_windows,
        options.types(),
        by_layer=options.by_layer,
        threads=max(0, values["n_threads"] or 0),
    )
    imatrix = read_imatrix(options.imatrix_file) if options.imatrix_file else None
    file, hp = read_model(path)
    if not options.allow_requantize:
        refuse_quantized(file)
    load = _loader(path, values)
    costs = run_with_progress(
        lambda listen, stop: measure_costs(file, hp, wanted, load, imatrix, listen=listen, stop=stop)
    )
    note_use(path)
    return costs


def _loader(path: Path, values: dict[str, Any]) -> Load:
    from dsmoe_local.cli.model_options import loading_options
    from dsmoe_local.engine.process.client import EngineClient
    from dsmoe_local.evaluate.measure import options_for

    values = without_model_changes(values)
    log_file: Path | None = values.pop("log_file")
    options = loading_options(path, values)

    def load(
        model: Path,
        n_context: int,
        observers: tuple[ObserverOptions, ...],
        listen: Listener,
        stop: threading.Event,
    ) -> AbstractContextManager[TextEngine]:
        wanted = options_for(replace(options, path=model), n_context, *observers)
        client: EngineClient = EngineClient.load(wanted, listen, stop, log_file=log_file)
        return client

    return load


def show(costs: ErrorCosts, *, as_json: bool, built_in: bool) -> None:
    """Print the result on stdout."""
    if as_json:
        print_json(_as_json(costs))
        return
    out = console(file_columns=160)
    for part in _parts(costs, out.width, built_in=built_in):
        out.print(part)


def _as_json(costs: ErrorCosts) -> dict[str, Any]:
    """Return the result as JSON; docs/evaluation.md describes the fields."""
    from dataclasses import asdict

    probes = costs.probes
    return {
        "model": costs.model,
        "file": str(costs.path),
        "text": probes.text,
        "text_digest": probes.text_digest,
        "n_context": probes.n_context,
        "n_windows": probes.n_windows,
        "floor": probes.floor,
        "groups": [
            {
                "group": each.group,
                "probes": {kind.name: asdict(probe) for kind, probe in each.probes.items()},
                "used": {kind.name: [used.name for used in each.used.get(kind, ())] for kind in each.probes},
                "cost": each.cost,
                "is_at_most": each.is_at_most,
                "built_in": each.built_in,
            }
            for each in costs.groups
        ],
    }


def _parts(costs: ErrorCosts, width: int, *, built_in: bool) -> Iterator[RenderableType]:
    from rich.text import Text as Line

    probes = costs.probes
    yield Line(safe_line(costs.model, 80), style="bold")
    yield Line(f"text  {probes.text}: {probes.n_windows} windows of {probes.n_context:,} tokens")
    yield _table(costs, is_narrow=width < _WIDE)
    if any(each.is_at_most for each in costs.groups):
        yield Line("<: the divergence is no larger than its error; the cost is an upper bound")
    if any(each.cost is None and each.fits for each in costs.groups):
        yield Line("-: the type stores these weights exactly; try another --probe")
    if any(not each.fits for each in costs.groups):
        yield Line(
            f"{_NO_FIT}: the type's blocks do not divide the rows of these tensors; {_PROBE} has the smallest"
        )
    yield Line(
        f"Stored in {safe_line(str(costs.path))}."
        " To use it: dsmoe quantize --target-size SIZE --sensitivity FILE"
    )
    if built_in:
        yield built_in_text()


_HEADINGS = ("group", "type", "relative\nerror", "KL divergence", "cost", "built\nin")


def _table(costs: ErrorCosts, *, is_narrow: bool) -> Table:
    """Return the table; a narrow one has neither errors nor built-in costs."""
    headings = ("group", "type", "KL divergence", "cost") if is_narrow else _HEADINGS
    table = plain_table(*headings, left=("group", "type"))
    for each in costs.groups:
        cost = "-" if each.cost is None else f"{'<' if each.is_at_most else ''}{each.cost:.3g}"
        first = (safe_line(each.group), cost, f"{each.built_in:.3g}")
        rows = [
            (
                _type_cell(kind, each.used.get(kind, ())),
                f"{probe.error:.3g}",
                f"{probe.kl:.3g} ± {probe.kl_error:.1g}",
            )
            for kind, probe in each.probes.items()
        ]
        for number, row in enumerate(rows or [("" if each.fits else _NO_FIT, "", "")]):
            name, *rest = first if not number else ("", "", "")
            kind, error, divergence = row
            figures = (divergence, *rest[:1]) if is_narrow else (error, divergence, *rest)
            table.add_row(name, kind, *figures)
    return table


def _type_cell(kind: GgmlType, used: tuple[GgmlType, ...]) -> str:
    """Return the type that was tried, and the types used instead where its blocks do not fit."""
    is_as_asked = used in ((), (kind,))
    return kind.name if is_as_asked else f"{kind.name}: {', '.join(kind.name for kind in used)}"
