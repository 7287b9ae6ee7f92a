"""`dsmoe eval`: measures a model on a text, alone or against a reference. `evaluate` does the work."""

from __future__ import annotations

import math
import os
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.eval_sensitivity import SensitivityOptions, sensitivity_options, without_model_changes
from dsmoe_local.cli.eval_sensitivity import run as measure_sensitivity
from dsmoe_local.cli.eval_sensitivity import show as show_sensitivity
from dsmoe_local.cli.model_argument import MODEL, find_model, model_argument, model_option
from dsmoe_local.cli.model_options import (
    check_window,
    load_engine,
    model_options_without_context,
    window_option,
)
from dsmoe_local.cli.option_sources import from_command_line, settle, source_in_errors
from dsmoe_local.cli.options import COUNT, FILE, json_option, option, typed
from dsmoe_local.cli.output import built_in_text, console, facts, plain_table, print_json
from dsmoe_local.cli.progress import run_with_progress

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

_LARGE = 1e9
"""Larger values are shown with an exponent."""


@define_command(
    "eval",
    ("dsmoe eval model.gguf --text wiki.txt", "Measure the perplexity."),
    ("dsmoe eval q4.gguf --against q8.gguf", "Also compare with a reference."),
    ("dsmoe eval m.gguf --sensitivity costs.json", "Measure costs for dsmoe quantize."),
)
@model_argument("model", "[MODEL]", required=False)
@model_option
@option(
    "--text",
    "source",
    "Text to predict.",
    typed(click.Path(allow_dash=True), "FILE|-"),
    shown="a built-in one",
)
@option(
    "--against",
    "against",
    "Reference to compare with: a model, or a file from --keep.",
    MODEL,
)
@option(
    "--keep",
    "kept",
    "Store the predictions of the reference, for a later --against. Without --against, MODEL is the"
    " reference.",
    FILE,
)
@option("--chunks", "n_windows", "Read only the first N windows.", COUNT, shown="all")
@sensitivity_options
@json_option()
@window_option
@model_options_without_context
def command(
    model: str | None,
    named_model: str | None,
    source: str | None,
    against: str | None,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Measure how well a model predicts a text.

    The perplexity is that of llama.cpp's tool: the text is read in windows of -c tokens, and the second half
    of each is scored. With --against, the model is compared with a reference: KL divergence, how often both
    have the same likeliest token, and in which layers their routers choose different experts.

    --active-experts, -ctk and -ctv apply to MODEL only: compare a model with itself to measure their effect.
    The built-in text is English and code from Python's sources (PSF licence), and Chinese by this project.

    --sensitivity quantizes one group of tensors after the other and measures the divergence that this causes.
    dsmoe quantize uses the result, with a target and the same --sensitivity FILE.
    """
    from dsmoe_local.evaluate.text import read_text

    values = settle(values | {"against": against}, ("sensitivity_file",), ("against", "kept"))
    against = values.pop("against")
    costs = SensitivityOptions.taken(values)
    costs.check()
    path = find_model(model, named_model)
    run = _Run(values.pop("kept"), values.pop("n_windows"), read_text(source), values)
    check_window(run.n_context)
    if source == "-" and against == "-":
        raise UsageError("--against takes a model or a file, not stdin")
    if costs.sensitivity_file is not None:
        found = measure_sensitivity(path, costs, run.text, run.n_context, run.n_windows, values)
        show_sensitivity(found, as_json=as_json, built_in=source is None)
        return
    with run.reserved():
        result = run.compared(path, against, source is not None) if against else run.alone(path)
    if as_json:
        print_json(result.as_json())
        return
    out = console()
    for part in _parts(result, built_in=source is None):
        out.print(part)


class _Run:
    """One run: measures its models, one after the other. `values` are the shared options."""

    def __init__(self, kept: Path | None, n_windows: int | None, text: Text, values: dict[str, Any]) -> None:
        self.kept = kept
        self.n_windows = n_windows
        self.text = text
        self.n_context: int = values["n_context"]
        self._values = values
        self._stop = threading.Event()

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Reserve the file of --keep, before hours are spent on its content."""
        from dsmoe_local.evaluate.reference import reserved

        with nullcontext() if self.kept is None else reserved(self.kept):
            yield

    def alone(self, path: Path) -> Evaluation:
        """Measure a model without a reference; --keep makes it one."""
        if self.kept is not None:
            with ExitStack() as stack:
                return self._record(stack, path, self._values)[1]
        from dsmoe_local.evaluate.measure import measure

        with self._load(path, self._values, self.n_context) as engine:
            windows = self._cut(engine)
            return run_with_progress(lambda listen, stop: measure(engine, windows, listen, stop), self._stop)

    def compared(self, path: Path, against: str, text_named: bool) -> Evaluation:
        """Measure a model against its reference, which is recorded first unless it is a file."""
        from dsmoe_local.evaluate.reference import compare, is_kept

        with ExitStack() as stack:
            file = Path(os.path.expanduser(against))
            if file.is_file() and is_kept(file):
                reference = self._unpack(stack, file, text_named)
            else:
                with source_in_errors("against"):
                    other = find_model(against)
                reference = self._record(stack, other, without_model_changes(self._values))[0]
            n_context = reference.windows.n_context
            with self._load(path, self._values, n_context, *reference.observers(path)) as engine:
                return run_with_progress(
                    lambda listen, stop: compare(engine, reference, listen, stop), self._stop
                )

    def _record(self, stack: ExitStack, path: Path, values: dict[str, Any]) -> tuple[Reference, Evaluation]:
        from dsmoe_local.base.scratch import scratch_folder
        from dsmoe_local.evaluate.reference import keep, record, recorders

        folder = stack.enter_context(scratch_folder("eval"))
        with self._load(path, values, self.n_context, *recorders(folder, path)) as engine:
            windows = self._cut(engine)
            recorded = run_with_progress(
                lambda listen, stop: record(engine, windows, folder, listen, stop), self._stop
            )
        if self.kept is not None:
            keep(recorded[0], self.kept)
        return recorded

    def _unpack(self, stack: ExitStack, file: Path, text_named: bool) -> Reference:
        from dsmoe_local.base.scratch import scratch_folder
        from dsmoe_local.evaluate.reference import unpack

        if self.kept is not None:
            raise UsageError(
                "--keep has no effect: the reference is a file already", where=safe_line(str(file))
            )
        reference = unpack(file, stack.enter_context(scratch_folder("eval")), self.n_windows)
        windows = reference.windows
        if text_named and windows.text_digest != self.text.digest:
            raise UsageError(
                f"the reference was recorded on another text: {windows.text}",
                where=safe_line(str(file)),
                remedy="leave --text out: the reference contains its text",
            )
        if from_command_line("n_context") and windows.n_context != self.n_context:
            raise UsageError(
                f"the reference was recorded in windows of {windows.n_context} tokens",
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
        yield built_in_text()


def _facts(result: Evaluation) -> Table:
    noun = "window" if result.n_windows == 1 else "windows"
    windows = f"{result.n_windows} {noun} of {result.n_context:,} tokens"
    rows = [
        ("text", f"{result.text}: {windows}, {result.perplexity.n_scored:,} scored"),
        ("speed", f"{result.tokens_per_second:.4g} tokens/s"),
        ("perplexity", _estimate(result.perplexity.perplexity)),
    ]
    if result.comparison is not None:
        rows += _comparison(result.comparison)
    return facts(rows)


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
        ("same top token", f"{_percentage(divergence.same_top)} of tokens"),
        ("same experts", _same_experts(comparison.routing)),
    ]


def _same_experts(routing: RoutingFidelity | None) -> str:
    if routing is None:
        return "no routers to compare"
    return f"{routing.same:.1%} of tokens in a layer on average, {routing.same_everywhere:.1%} in all layers"


def _routing_table(routing: RoutingFidelity) -> Table:
    table = plain_table("layer", "same experts", "overlap", "gate KL")
    for layer in routing.layers:
        gate_kl = _bounded(layer.gate_kl.value, layer.gate_kl_bound)
        table.add_row(str(layer.layer), f"{layer.same:.1%}", f"{layer.overlap.value:.2%}", gate_kl)
    table.add_section()
    gate_kl = _bounded(routing.gate_kl, routing.gate_kl_bound)
    table.add_row("mean", f"{routing.same:.1%}", f"{routing.overlap:.2%}", gate_kl)
    return table


def _bounded(value: float, bound: float) -> str:
    """Return a value, or its bound if it is smaller than its error."""
    return f"< {bound:.2g}" if value < bound else f"{value:.2g}"


def _estimate(estimate: Estimate) -> str:
    """Return a value with the digits that its error leaves meaningful."""
    if estimate.error <= 0:
        return f"{estimate.value:.4g}"
    if estimate.value >= _LARGE:
        return f"{estimate.value:.4g} ± {estimate.error:.2g}"
    digits = min(9, max(0, 1 - math.floor(math.log10(estimate.error))))
    return f"{estimate.value:,.{digits}f} ± {estimate.error:,.{digits}f}"


def _percentage(estimate: Estimate) -> str:
    return f"{estimate.value:.2%} ± {estimate.error:.2%}"
