"""`dsmoe bench`: how fast models are, side by side. evaluate.speed measures and writes."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.cli.configuration import from_command_line
from dsmoe_local.cli.model_options import ModelName, find_model, load_engine, model_options, within_training

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsmoe_local.evaluate.speed.machine import Machine
    from dsmoe_local.evaluate.speed.results import ModelSpeed
    from dsmoe_local.evaluate.speed.timing import Workload

_MOST_TOKENS = 1 << 20
_MOST_THREADS = 512


class TokenCounts(click.ParamType[tuple[int, ...]]):
    """Numbers of tokens, separated by commas; each is measured."""

    name = "N,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """The numbers, each once."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if not all(word.isascii() and word.isdigit() for word in words):
            self.fail(f"{value!r} is not a number of tokens, or several with commas", param, ctx)
        counts = tuple(dict.fromkeys(map(int, words)))
        if max(counts) > _MOST_TOKENS:
            self.fail(f"{max(counts)} is out of range: at most {_MOST_TOKENS} tokens", param, ctx)
        return counts


@click.command(name="bench")
@click.argument("models", nargs=-1, metavar="[MODEL]...", type=ModelName())
@click.option(
    "-m",
    "--model",
    "named_models",
    type=ModelName(),
    multiple=True,
    help="A model, a file or a name that dsmoe models lists; several times for several [the demo's].",
)
@click.option(
    "-p",
    "--n-prompt",
    "n_prompts",
    type=TokenCounts(),
    default="512",
    help="Tokens of a prompt; 0: none [512].",
)
@click.option(
    "-n", "--n-gen", "n_gens", type=TokenCounts(), default="128", help="Tokens to decode; 0: none [128]."
)
@click.option(
    "-d", "--n-depth", "n_depths", type=TokenCounts(), default="0", help="Tokens of context before them [0]."
)
@click.option(
    "-r", "--repetitions", type=click.IntRange(1), default=5, metavar="N", help="How often each is timed [5]."
)
@click.option(
    "-o",
    "--output-format",
    type=click.Choice(["md", "json", "csv"]),
    default="md",
    help="How the result is written [md].",
)
@model_options
def command(
    models: tuple[str, ...],
    named_models: tuple[str, ...],
    n_prompts: tuple[int, ...],
    n_gens: tuple[int, ...],
    n_depths: tuple[int, ...],
    repetitions: int,
    output_format: str,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Measure how fast models read prompts and decode, side by side.

    Prints llama-bench's table, or its JSON or CSV, and what explains it: the active experts, what is read per
    token, the bytes per second that makes and their share of what the memory gives, the time to load, and the
    memory that the engine took.
    """
    from dsmoe_local.evaluate.speed.timing import workloads_of

    workloads = workloads_of(n_prompts, n_gens, n_depths)
    if not workloads:
        raise UsageError("there is nothing to measure", remedy="-p or -n takes a number from 1")
    # Names in the config file are for commands that are given none.
    named = [*models, *(named_models if from_command_line("named_models") or not models else ())]
    paths = [find_model(name) for name in named] or [find_model()]
    bench = _Bench(workloads, repetitions, values)
    try:
        bench.run(paths)
    finally:
        # What was measured is shown even if something ended the run.
        bench.show(output_format)


class _Bench:
    """One run: the machine, then each model in a process of its own. Takes the shared options as `values`."""

    def __init__(self, workloads: Sequence[Workload], repetitions: int, values: dict[str, Any]) -> None:
        self._workloads = workloads
        self._repetitions = repetitions
        self._values = values
        self._stop = threading.Event()
        self._machine: Machine | None = None
        self._models: list[ModelSpeed] = []

    def run(self, paths: Sequence[Path]) -> None:
        """Measure. Raises what loading and measuring do."""
        from dsmoe_local.cli.render import run_with_progress
        from dsmoe_local.engine.load.machine import physical_cores
        from dsmoe_local.evaluate.speed.machine import look_at_machine
        from dsmoe_local.model.gguf_model import read_model

        # A file that cannot be used is told before minutes are spent on others.
        are_moe = [read_model(path)[1].is_moe for path in paths]
        # Numbers that the engine refuses are for it to tell.
        n_threads = min(max(1, self._values["n_threads"] or physical_cores()), _MOST_THREADS)
        self._machine = run_with_progress(
            lambda listen, stop: look_at_machine(n_threads, listen, stop), self._stop
        )
        for path, is_moe in zip(paths, are_moe, strict=True):
            values = dict(self._values)
            if not is_moe and any(are_moe):
                # Beside a dense model, it is for the others.
                values["n_experts_per_token"] = None
            self._models.append(self._measure(path, values))

    def _measure(self, path: Path, values: dict[str, Any]) -> ModelSpeed:
        from dsmoe_local.cli.render import run_with_progress
        from dsmoe_local.evaluate.speed.results import measure_model
        from dsmoe_local.evaluate.speed.timing import options_for

        began = time.perf_counter()
        with load_engine(
            path, values, lambda options: options_for(within_training(options), self._workloads), self._stop
        ) as engine:
            seconds = time.perf_counter() - began
            return run_with_progress(
                lambda listen, stop: measure_model(
                    engine, seconds, self._workloads, self._repetitions, listen, stop
                ),
                self._stop,
            )

    def show(self, output_format: str) -> None:
        """Print the models that are done, if any."""
        from dsmoe_local.evaluate.speed.output import FORMATS, as_text

        if self._machine is None or not self._models:
            return
        if output_format == "md" and sys.stdout.isatty():
            width = shutil.get_terminal_size().columns
            click.echo(as_text(self._machine, self._models, width))
        else:
            click.echo(FORMATS[output_format](self._machine, self._models))


for _option in command.params:
    if isinstance(_option, click.Option) and _option.name == "n_context":
        _option.help = "Context in tokens [what the longest measurement needs]."
