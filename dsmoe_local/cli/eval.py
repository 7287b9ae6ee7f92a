"""`dsmoe eval`: how well a model predicts a text, alone or beside a reference. `evaluate` measures."""

from __future__ import annotations

import json
import math
import os
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.configuration import from_command_line, told_origin
from dsmoe_local.cli.eval_sensitivity import SensitivityOptions, as_it_is, sensitivity_options
from dsmoe_local.cli.eval_sensitivity import run as measure_sensitivity
from dsmoe_local.cli.eval_sensitivity import show as show_sensitivity
from dsmoe_local.cli.model_options import (
    ModelName,
    find_model,
    load_engine,
    model_argument,
    model_option,
    model_options,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from dsmoe_local.engine.process.client import EngineClient
    from dsmoe_local.engine.types import ObserverOptions
    from dsmoe_local.evaluate.reference import Reference
    from dsmoe_local.evaluate.results import Comparison, Estimate, Evaluation, RoutingFidelity
    from dsmoe_local.evaluate.text import Text
    from dsmoe_local.evaluate.windows import Windows

_N_CONTEXT = 512
_LARGE = 1e9  # from here on digits are not written out


@click.command(name="eval")
@model_argument
@model_option
@click.option(
    "--text",
    "source",
    type=click.Path(allow_dash=True),
    metavar="FILE|-",
    help="The text to predict [a built-in one].",
)
@click.option(
    "--against",
    type=ModelName(),
    metavar="MODEL|FILE",
    help="Compare with this model, or with what --keep has kept of one.",
)
@click.option(
    "--keep",
    "kept",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep what the reference predicted, for later; without --against, what MODEL did.",
)
@click.option(
    "--chunks", "n_windows", type=click.IntRange(1), metavar="N", help="Read only the first N windows [all]."
)
@sensitivity_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@model_options
def command(
    model: str | None,
    named_model: str | None,
    source: str | None,
    against: str | None,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Measure how well a model predicts a text.

    Prints the perplexity, as llama.cpp's tool counts it: windows of -c tokens, of which the second half is
    scored. With --against also how far the model is from a reference: the Kullback-Leibler divergence, how
    often both find the same token likeliest, and in which layers they choose other experts.

    --active-experts, -ctk and -ctv apply to MODEL alone, so their effect can be measured against the same
    file. The built-in text is English and code that Python ships (PSF licence), and Chinese of this project.

    --sensitivity quantizes one group of tensors of MODEL after the other, and measures how far that moves it.
    What it finds is used by dsmoe-quantize --target-size and the like, with the same --sensitivity FILE.
    """
    from dsmoe_local.evaluate.text import read_text

    excluded = {"against": ("--against", against), "kept": ("--keep", values["kept"])}
    costs = SensitivityOptions.taken(values).beside(excluded)
    costs.check()
    path = find_model(model, named_model)
    run = _Run(values.pop("kept"), values.pop("n_windows"), read_text(source), values)
    _check(run, against, source)
    if costs.sensitivity_file is not None:
        found = measure_sensitivity(path, costs, run.text, run.n_context, run.n_windows, values)
        show_sensitivity(found, as_json=as_json, built_in=source is None)
        return
    with run.reserved():
        result = run.compared(path, against, source is not None) if against else run.alone(path)
    if as_json:
        click.echo(json.dumps(result.as_json(), ensure_ascii=True))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for part in _parts(result, built_in=source is None):
        console.print(part)


for _option in command.params:
    if isinstance(_option, click.Option) and _option.name == "n_context":
        _option.help = f"Tokens of a window [{_N_CONTEXT}]."


def _check(run: _Run, against: str | None, source: str | None) -> None:
    """What can be told before a model is loaded."""
    from dsmoe_local.evaluate.windows import MIN_CONTEXT

    if run.n_context < MIN_CONTEXT:
        with told_origin("n_context"):
            raise UsageError(
                f"-c {run.n_context} is out of range", remedy=f"windows have {MIN_CONTEXT} tokens or more"
            )
    if source == "-" and against == "-":
        raise UsageError("--against takes a model or a file")


class _Run:
    """The models of one command, one after the other. Takes the shared options as `values`."""

    def __init__(self, kept: Path | None, n_windows: int | None, text: Text, values: dict[str, Any]) -> None:
        self.kept = kept
        self.n_windows = n_windows
        self.text = text
        self.n_context: int = values["n_context"] or _N_CONTEXT
        self._values = values
        self._stop = threading.Event()

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Hold the name of the file that --keep names, before hours are spent on it."""
        from dsmoe_local.evaluate.reference import reserved

        with nullcontext() if self.kept is None else reserved(self.kept):
            yield

    def alone(self, path: Path) -> Evaluation:
        """A model without a reference; it may become one."""
        if self.kept is not None:
            with ExitStack() as stack:
                return self._record(stack, path, self._values)[1]
        from dsmoe_local.cli.render import run_with_progress
        from dsmoe_local.evaluate.measure import measure

        with self._load(path, self._values, self.n_context) as engine:
            windows = self._cut(engine)
            return run_with_progress(lambda listen, stop: measure(engine, windows, listen, stop), self._stop)

    def compared(self, path: Path, against: str, text_named: bool) -> Evaluation:
        """A model beside its reference, which is recorded first unless it was kept."""
        from dsmoe_local.cli.render import run_with_progress
        from dsmoe_local.evaluate.reference import compare, is_kept

        with ExitStack() as stack:
            file = Path(os.path.expanduser(against))
            if file.is_file() and is_kept(file):
                reference = self._unpack(stack, file, text_named)
            else:
                with told_origin("against"):
                    other = find_model(against)
                # What is measured is the options' effect: the reference is as it would be without them.
                reference = self._record(stack, other, as_it_is(self._values))[0]
            n_context = reference.windows.n_context
            with self._load(path, self._values, n_context, *reference.observers(path)) as engine:
                return run_with_progress(
                    lambda listen, stop: compare(engine, reference, listen, stop), self._stop
                )

    def _record(self, stack: ExitStack, path: Path, values: dict[str, Any]) -> tuple[Reference, Evaluation]:
        from dsmoe_local.cli.render import run_with_progress
        from dsmoe_local.evaluate.reference import keep, record, recorders
        from dsmoe_local.evaluate.scratch import scratch_folder

        folder = stack.enter_context(scratch_folder())
        with self._load(path, values, self.n_context, *recorders(folder, path)) as engine:
            windows = self._cut(engine)
            recorded = run_with_progress(
                lambda listen, stop: record(engine, windows, folder, listen, stop), self._stop
            )
        if self.kept is not None:
            keep(recorded[0], self.kept)
        return recorded

    def _unpack(self, stack: ExitStack, file: Path, text_named: bool) -> Reference:
        from dsmoe_local.evaluate.reference import unpack
        from dsmoe_local.evaluate.scratch import scratch_folder

        if self.kept is not None:
            raise UsageError("--keep: the reference is a kept one already", where=safe_line(str(file)))
        reference = unpack(file, stack.enter_context(scratch_folder()), self.n_windows)
        windows = reference.windows
        if text_named and windows.text_digest != self.text.digest:
            raise UsageError(
                f"the reference was kept of another text: {windows.text}",
                where=safe_line(str(file)),
                remedy="leave --text out: the kept reference has its own",
            )
        if from_command_line("n_context") and windows.n_context != self.n_context:
            raise UsageError(
                f"the reference was kept in windows of {windows.n_context} tokens",
                where=safe_line(str(file)),
                remedy="leave -c out",
            )
        return reference

    def _cut(self, engine: EngineClient) -> Windows:
        from dsmoe_local.evaluate.windows import cut_windows

        return cut_windows(engine, self.text, self.n_context, self.n_windows)

    def _load(
        self, path: Path, values: dict[str, Any], n_context: int, *observers: ObserverOptions
    ) -> EngineClient:
        from dsmoe_local.evaluate.measure import options_for

        return load_engine(
            path, dict(values), lambda options: options_for(options, n_context, *observers), self._stop
        )


def _parts(result: Evaluation, *, built_in: bool) -> Iterator[RenderableType]:
    from rich import text as rich_text

    yield rich_text.Text(safe_line(result.model, 80), style="bold")
    yield _facts(result)
    routing = result.comparison.routing if result.comparison else None
    if routing is not None:
        yield _routing_table(routing)
    if built_in:
        from dsmoe_local.evaluate.text import LICENCES

        yield rich_text.Text(f"The built-in text: {LICENCES}.", style="dim")


def _facts(result: Evaluation) -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    noun = "window" if result.n_windows == 1 else "windows"
    windows = f"{result.n_windows} {noun} of {result.n_context:,} tokens"
    rows = [
        ("text", f"{result.text}: {windows}, {result.perplexity.n_scored:,} scored"),
        ("speed", f"{result.tokens_per_second:.4g} tokens/s"),
        ("perplexity", _estimate(result.perplexity.perplexity)),
    ]
    if result.comparison is not None:
        rows += _comparison(result.comparison)
    for row in rows:
        grid.add_row(*row)
    return grid


def _comparison(comparison: Comparison) -> list[tuple[str, str]]:
    divergence, reference = comparison.divergence, safe_line(comparison.reference, 80)
    quantiles = [
        f"{100 * float(share):g}% below {value:.3g}" for share, value in divergence.quantiles.items()
    ]
    return [
        ("reference", f"{reference}: {_estimate(comparison.reference_perplexity.perplexity)}"),
        ("perplexity ratio", _estimate(divergence.ratio)),
        ("KL divergence", f"{_estimate(divergence.kl)} nats at least, {divergence.kl_upper:.3g} at most"),
        ("KL of a token", f"{', '.join(quantiles)}, largest {divergence.maximum:.3g}"),
        ("same likeliest", f"{_percentage(divergence.same_top)} of tokens"),
        ("same experts", _same_experts(comparison.routing)),
    ]


def _same_experts(routing: RoutingFidelity | None) -> str:
    if routing is None:
        return "no routers to compare"
    return f"{routing.same:.1%} of tokens in a layer on average, {routing.same_everywhere:.1%} in all layers"


def _routing_table(routing: RoutingFidelity) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("layer", "same experts", "overlap", "gate KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in routing.layers:
        gate_kl = _bounded(layer.gate_kl.value, layer.gate_kl_bound)
        table.add_row(str(layer.layer), f"{layer.same:.1%}", f"{layer.overlap.value:.2%}", gate_kl)
    table.add_section()
    gate_kl = _bounded(routing.gate_kl, routing.gate_kl_bound)
    table.add_row("mean", f"{routing.same:.1%}", f"{routing.overlap:.2%}", gate_kl)
    return table


def _bounded(value: float, bound: float) -> str:
    """What is smaller than its error is not known to be anything."""
    return f"< {bound:.2g}" if value < bound else f"{value:.2g}"


def _estimate(estimate: Estimate) -> str:
    """As many digits as its error makes worth showing."""
    if estimate.error <= 0:
        return f"{estimate.value:.4g}"
    if estimate.value >= _LARGE:
        return f"{estimate.value:.4g} ± {estimate.error:.2g}"
    digits = min(9, max(0, 1 - math.floor(math.log10(estimate.error))))
    return f"{estimate.value:,.{digits}f} ± {estimate.error:,.{digits}f}"


def _percentage(estimate: Estimate) -> str:
    return f"{estimate.value:.2%} ± {estimate.error:.2%}"
