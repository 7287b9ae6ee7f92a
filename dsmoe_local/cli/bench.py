"""`dsmoe bench`: the speed of models, side by side. evaluate.speed measures and formats."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import MODEL, find_model, model_argument
from dsmoe_local.cli.model_options import (
    COMPARE_KERNELS,
    benchmark_model_options,
    load_engine,
    within_training,
)
from dsmoe_local.cli.option_sources import from_command_line
from dsmoe_local.cli.options import COUNT, FLAG, NUMBER, choice, option, parsed
from dsmoe_local.cli.output import show_result
from dsmoe_local.cli.progress import run_with_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsmoe_local.engine.load.kernels import Kernels
    from dsmoe_local.evaluate.speed.machine import Machine
    from dsmoe_local.evaluate.speed.results import ModelSpeed
    from dsmoe_local.evaluate.speed.timing import Workload

_MOST_TOKENS = 1 << 20
_MOST_THREADS = 512


def _token_counts(text: str) -> tuple[int, ...]:
    """Read numbers of tokens separated by commas, without duplicates."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise ValueError(f"{text!r} is not a list of token counts, such as 512,2048")
    counts = tuple(dict.fromkeys(map(int, words)))
    if max(counts) > _MOST_TOKENS:
        raise ValueError(f"{max(counts)} is out of range: at most {_MOST_TOKENS} tokens")
    return counts


_COUNTS = parsed(_token_counts, "N,...")


@define_command(
    "bench",
    ("dsmoe bench a.gguf b.gguf", "Compare two models."),
    ("dsmoe bench m.gguf -p 0 -n 128 -d 0,4096", "Decode at two depths."),
    ("dsmoe bench m.gguf --kernels --save", "Find and keep the fastest kernels."),
    ("dsmoe bench m.gguf -o json", "Print the result as JSON."),
)
@model_argument("models", "[MODEL]...", nargs=-1)
@option(
    "-m, --model",
    "named_models",
    "A model: a file, or a name that `dsmoe models` lists. Repeatable.",
    MODEL,
    multiple=True,
    shown="the demo's",
)
@option(
    "-p, --n-prompt",
    "n_prompts",
    "Lengths of the prompt in tokens; 0 = no prompt.",
    _COUNTS,
    default="512",
)
@option("-n, --n-gen", "n_gens", "Numbers of tokens to decode; 0 = none.", _COUNTS, default="128")
@option(
    "-d, --n-depth",
    "n_depths",
    "Tokens in the context before the measurement.",
    _COUNTS,
    default="0",
)
@option("-r, --repetitions", "repetitions", "Number of runs of each measurement.", COUNT, default=5)
@option(
    "-o, --output-format", "output_format", "Format of the result.", choice("md", "json", "csv"), default="md"
)
@option(
    "-c, --ctx-size",
    "n_context",
    "Context in tokens.",
    NUMBER,
    section_only=True,
    # At the top level of the config file, this is the context of chats.
    shown="what the longest measurement needs",
)
@option("--save", "save", "With --kernels: let --kernels auto use the result from now on.", FLAG)
@benchmark_model_options
def command(
    models: tuple[str, ...],
    named_models: tuple[str, ...],
    n_prompts: tuple[int, ...],
    n_gens: tuple[int, ...],
    n_depths: tuple[int, ...],
    repetitions: int,
    output_format: str,
    save: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Measure how fast models process prompts and decode, side by side.

    The result has the form of llama-bench's table, JSON or CSV. It also has what explains the speed: active
    experts, bytes read per token, the memory bandwidth used and its share of what the machine offers, load
    time, and memory of the engine.
    """
    from dsmoe_local.evaluate.speed.timing import workloads_of

    workloads = workloads_of(n_prompts, n_gens, n_depths)
    if not workloads:
        raise UsageError("there is nothing to measure", remedy="give -p or -n a number from 1")
    # Models from a variable or the config file are used only if the command line names none.
    named = [*models, *(named_models if from_command_line("named_models") or not models else ())]
    paths = [find_model(name) for name in named] or [find_model()]
    if values["kernels"] == COMPARE_KERNELS:
        for path in paths:
            _compare_kernels(path, workloads, repetitions, output_format, values, save=save)
        return
    if save:
        raise UsageError("--save keeps a comparison of kernels", remedy="add --kernels, without a value")
    bench = _Bench(workloads, repetitions, values)
    try:
        bench.run(paths)
    finally:
        # After an error or an interruption, show what was measured.
        bench.show(output_format)


def _compare_kernels(
    path: Path,
    workloads: Sequence[Workload],
    n_rounds: int,
    output_format: str,
    values: dict[str, Any],
    *,
    save: bool,
) -> None:
    """Compare the forms of a model's weights, print the result, and save it if `save`."""
    from dsmoe_local.engine.load.kernel_speeds import save_speeds
    from dsmoe_local.engine.load.kernels import FormSpeed
    from dsmoe_local.evaluate.speed.kernel_comparison import (
        FormRun,
        compare_kernels,
        comparison_as_json,
        comparison_as_markdown,
        median_speeds,
    )
    from dsmoe_local.evaluate.speed.timing import options_for, time_workloads

    prompts = [each for each in workloads if each.n_prompt]
    replies = [each for each in workloads if each.n_gen]
    if len(prompts) != 1 or len(replies) != 1:
        raise UsageError(
            "--kernels compares one length of prompts and one of replies", remedy="such as -p 512 -n 128"
        )
    if output_format == "csv":
        raise UsageError("-o csv: a comparison of kernels has no CSV", remedy="use -o md or -o json")
    pair = prompts[0], replies[0]
    stop = threading.Event()

    def measure(form: Kernels) -> FormRun:
        began = time.perf_counter()
        with load_engine(
            path,
            values | {"kernels": form.value},
            lambda options: options_for(within_training(options), pair),
            stop,
        ) as engine:
            seconds = time.perf_counter() - began
            if save and "; " in engine.info.placement:
                raise UsageError(
                    "--save: a part of the model is on a GPU, where --kernels has no effect",
                    remedy="add -ngl 0",
                )
            timed = run_with_progress(
                lambda listen, stop: time_workloads(engine, pair, 1, listen, stop), stop
            )
            speed = FormSpeed(*(each.workload.n_tokens / each.seconds[0] for each in timed))
            return FormRun(speed, seconds, engine.info.kernels)

    runs = compare_kernels(measure, n_rounds)
    write = comparison_as_json if output_format == "json" else comparison_as_markdown
    click.echo(write(runs, *pair))
    if save:
        show_result(f"saved in {save_speeds(path, median_speeds(runs))}, for later loads with --kernels auto")


class _Bench:
    """One run: measures the machine, then each model in its own process. `values` are the shared options."""

    def __init__(self, workloads: Sequence[Workload], repetitions: int, values: dict[str, Any]) -> None:
        self._workloads = workloads
        self._repetitions = repetitions
        self._values = values
        self._stop = threading.Event()
        self._machine: Machine | None = None
        self._models: list[ModelSpeed] = []

    def run(self, paths: Sequence[Path]) -> None:
        """Measure all models. Raises the errors of loading and measuring."""
        from dsmoe_local.engine.load.machine import physical_cores
        from dsmoe_local.evaluate.speed.machine import look_at_machine
        from dsmoe_local.model.gguf_model import read_any_model

        # Report a bad file before measuring the others, which takes minutes.
        are_moe = [read_any_model(path)[1].is_moe for path in paths]
        # The engine reports numbers out of range.
        n_threads = min(max(1, self._values["n_threads"] or physical_cores()), _MOST_THREADS)
        self._machine = run_with_progress(
            lambda listen, stop: look_at_machine(n_threads, listen, stop), self._stop
        )
        for path, is_moe in zip(paths, are_moe, strict=True):
            values = dict(self._values)
            if not is_moe and any(are_moe):
                # --active-experts applies to the MoE models of the comparison only.
                values["n_experts_per_token"] = None
            self._models.append(self._measure(path, values))

    def _measure(self, path: Path, values: dict[str, Any]) -> ModelSpeed:
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
        """Print the results of the models that were measured."""
        from dsmoe_local.evaluate.speed.output import FORMATS, as_text

        if self._machine is None or not self._models:
            return
        if output_format == "md" and sys.stdout.isatty():
            width = shutil.get_terminal_size().columns
            click.echo(as_text(self._machine, self._models, width))
        else:
            click.echo(FORMATS[output_format](self._machine, self._models))
