"""`dsmoe eval --sensitivity`: its options, the run and the table. `evaluate.error_cost` measures."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.configuration import from_command_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from dsmoe_local.base.progress import Listener
    from dsmoe_local.engine.process.client import EngineClient
    from dsmoe_local.engine.types import ObserverOptions, TextEngine
    from dsmoe_local.evaluate.error_cost import ErrorCosts, Load
    from dsmoe_local.evaluate.text import Text
    from dsmoe_local.model.ggml import GgmlType

Function = TypeVar("Function", bound=Callable[..., Any])

_PROBE = "q4_0"
_NO_FIT = "none fits"
_WIDE = 76
"""Columns that all of the table takes."""
_OPTIONS = (
    click.option(
        "--sensitivity",
        "sensitivity_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Measure what errors in each group of tensors cost, and keep it here for dsmoe-quantize.",
    ),
    click.option(
        "--probe",
        "probes",
        multiple=True,
        metavar="TYPE",
        help=f"With --sensitivity: the type to try; several are averaged [{_PROBE}].",
    ),
    click.option("--by-layer", is_flag=True, help="… each group of each layer by itself."),
    click.option(
        "--imatrix",
        "imatrix_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="… with this importance matrix, as dsmoe-quantize will.",
    ),
    click.option("--allow-requantize", is_flag=True, help="… of a model that is quantized already."),
)
_ALONE = {
    "probes": "--probe",
    "by_layer": "--by-layer",
    "imatrix_file": "--imatrix",
    "allow_requantize": "--allow-requantize",
}
_MODELS_OWN = {
    "n_experts_per_token": ("--active-experts", None),
    "cache_type_k": ("-ctk", "f16"),
    "cache_type_v": ("-ctv", "f16"),
}


def as_it_is(values: dict[str, Any]) -> dict[str, Any]:
    """The shared options without those whose effect would be measured: for a model to compare with."""
    return values | {name: value for name, (_, value) in _MODELS_OWN.items()}


def sensitivity_options(function: Function) -> Function:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True, slots=True)
class SensitivityOptions:
    """The options as they are given."""

    sensitivity_file: Path | None
    probes: tuple[str, ...]
    by_layer: bool
    imatrix_file: Path | None
    allow_requantize: bool

    @classmethod
    def taken(cls, values: dict[str, Any]) -> SensitivityOptions:
        """Out of all options of the command."""
        names = ("sensitivity_file", *_ALONE)
        return cls(**{name: values.pop(name) for name in names})

    def beside(self, others: Mapping[str, tuple[str, object]]) -> SensitivityOptions:
        """Without --sensitivity where the command line has another option of `others`, which it excludes, and
        only the config file has it. UsageError if both are on the command line, or both are not.

        `others` are, by parameter, the option and its value.
        """
        given = {name: option for name, (option, value) in others.items() if value is not None}
        if self.sensitivity_file is None or not given:
            return self
        is_typed = from_command_line("sensitivity_file")
        typed = [option for name, option in given.items() if from_command_line(name)]
        if is_typed == bool(typed):
            option = next(iter(typed or given.values()))
            raise UsageError(f"--sensitivity and {option} exclude each other", remedy="give one of them")
        return self if is_typed else replace(self, sensitivity_file=None)

    def check(self) -> None:
        """UsageError for what does not go together on the command line."""
        if self.sensitivity_file is None:
            for name, option in _ALONE.items():
                if getattr(self, name) and from_command_line(name):
                    raise UsageError(f"{option} needs --sensitivity")
            return
        for name, (option, _) in _MODELS_OWN.items():
            if from_command_line(name):
                raise UsageError(f"{option} does not go with --sensitivity")

    def types(self) -> tuple[GgmlType, ...]:
        """The types to try. UsageError for what is none."""
        from dsmoe_local.model.ggml import FLOATS
        from dsmoe_quantize.policy.types import parse_target

        types = tuple(dict.fromkeys(parse_target(word) for word in self.probes or (_PROBE,)))
        if FLOATS.intersection(types):
            raise UsageError("--probe takes a type of blocks, as q4_0")
        return types


def run(
    path: Path,
    options: SensitivityOptions,
    text: Text,
    n_context: int,
    n_windows: int | None,
    values: dict[str, Any],
) -> ErrorCosts:
    """Measure the model at `path`; takes the shared options as `values`."""
    from dsmoe_local.cli.render import run_with_progress
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

    values = as_it_is(values)
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
        click.echo(json.dumps(_as_json(costs), ensure_ascii=True))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    for part in _parts(costs, console.width, built_in=built_in):
        console.print(part)


def _as_json(costs: ErrorCosts) -> dict[str, Any]:
    """docs/evaluation.md says what the fields are."""
    from dataclasses import asdict

    from dsmoe_local.model.ggml import type_name

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
                "probes": {type_name(kind): asdict(probe) for kind, probe in each.probes.items()},
                "used": {
                    type_name(kind): [type_name(used) for used in each.used.get(kind, ())]
                    for kind in each.probes
                },
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
        yield Line("-: the type stores these weights without loss; try another --probe")
    if any(not each.fits for each in costs.groups):
        yield Line(
            f"{_NO_FIT}: the type's blocks do not divide the rows of these tensors; {_PROBE} has the smallest"
        )
    yield Line(
        f"Kept in {safe_line(str(costs.path))}."
        " To use it: dsmoe-quantize --target-size SIZE --sensitivity FILE"
    )
    if built_in:
        from dsmoe_local.evaluate.text import LICENCES

        yield Line(f"The built-in text: {LICENCES}.", style="dim")


_HEADINGS = ("group", "type", "relative\nerror", "KL divergence", "cost", "built\nin")


def _table(costs: ErrorCosts, *, is_narrow: bool) -> Table:
    """A narrow one leaves out what the JSON has, too: the errors, and the built-in costs."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    headings = ("group", "type", "KL divergence", "cost") if is_narrow else _HEADINGS
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("group", "type") else "right", no_wrap=True)
    for each in costs.groups:
        cost = "-" if each.cost is None else f"{'<' if each.is_at_most else ''}{each.cost:.3g}"
        first = (safe_line(each.group), cost, f"{each.built_in:.3g}")
        rows = [
            (
                _told(kind, each.used.get(kind, ())),
                f"{probe.error:.3g}",
                f"{probe.kl:.3g} ± {probe.kl_error:.1g}",
            )
            for kind, probe in each.probes.items()
        ]
        for number, row in enumerate(rows or [("" if each.fits else _NO_FIT, "", "")]):
            name, *rest = first if not number else ("", "", "")
            told, error, divergence = row
            figures = (divergence, *rest[:1]) if is_narrow else (error, divergence, *rest)
            table.add_row(name, told, *figures)
    return table


def _told(kind: GgmlType, used: tuple[GgmlType, ...]) -> str:
    """The type that was tried, and what stood in for it where it does not fit."""
    from dsmoe_local.model.ggml import type_name

    is_as_asked = used in ((), (kind,))
    return type_name(kind) if is_as_asked else f"{type_name(kind)}: {', '.join(map(type_name, used))}"
