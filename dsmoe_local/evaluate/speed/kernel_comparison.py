"""Compares the forms of a model's weights, for `dsmoe bench --kernels`: which one is the fastest here?"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dsmoe_local.engine.load.kernels import FORMS, FormSpeed, Kernels, fastest_form
from dsmoe_local.engine.types import CHAT_RATIO, PROMPTS_ONLY
from dsmoe_local.evaluate.speed.output import markdown_table
from dsmoe_local.evaluate.speed.results import deviation
from dsmoe_local.evaluate.speed.timing import Workload


@dataclass(frozen=True, slots=True)
class FormRun:
    """One load of the model: its speed, the seconds of loading, and what the engine says of its kernels."""

    speed: FormSpeed
    load_seconds: float
    kernels: str


Runs: TypeAlias = Mapping[Kernels, Sequence[FormRun]]
"""All runs of each form."""


def compare_kernels(measure: Callable[[Kernels], FormRun], n_rounds: int) -> Runs:
    """Measure each form `n_rounds` times, in alternating order, so that a slow drift favors none."""
    runs: dict[Kernels, list[FormRun]] = {form: [] for form in FORMS}
    for number in range(n_rounds):
        for form in FORMS[:: -1 if number % 2 else 1]:
            runs[form].append(measure(form))
    return runs


def median_speeds(runs: Runs) -> dict[Kernels, FormSpeed]:
    """Return the median speeds of each form."""
    return {
        form: FormSpeed(
            statistics.median(run.speed.prompt for run in each),
            statistics.median(run.speed.decode for run in each),
        )
        for form, each in runs.items()
    }


def comparison_as_json(runs: Runs, prompt: Workload, reply: Workload) -> str:
    """Return the comparison as a JSON object: tokens per second by form, and the fastest forms."""
    forms = {
        form.value: {
            "kernels": each[0].kernels,
            "load_seconds": [round(run.load_seconds, 3) for run in each],
            "prompt_ts": [run.speed.prompt for run in each],
            "decode_ts": [run.speed.decode for run in each],
        }
        for form, each in runs.items()
    }
    record = {
        "n_prompt": prompt.n_tokens,
        "n_gen": reply.n_tokens,
        "forms": forms,
        "fastest": _fastest(runs),
    }
    return json.dumps(record, indent=2)


def comparison_as_markdown(runs: Runs, prompt: Workload, reply: Workload) -> str:
    """Return a table with a row for each form, and a line with the fastest form for each kind of job."""
    speeds = median_speeds(runs)
    base = speeds[Kernels.REPACK]
    columns = [
        ("--kernels", False),
        ("load", True),
        (f"{prompt.label}, t/s", True),
        ("to repack", True),
        (f"{reply.label}, t/s", True),
        ("to repack", True),
    ]
    cells = [
        [
            form.value,
            f"{statistics.median(run.load_seconds for run in each):.2f} s",
            _rate([run.speed.prompt for run in each]),
            f"{speeds[form].prompt / base.prompt:.2f} x",
            _rate([run.speed.decode for run in each]),
            f"{speeds[form].decode / base.decode:.2f} x",
        ]
        for form, each in runs.items()
    ]
    fastest = "; ".join(f"fastest for {job}: {form}" for job, form in _fastest(runs).items())
    return f"{markdown_table(columns, cells)}\n\n{fastest}"


def _fastest(runs: Runs) -> dict[str, str]:
    """Return the fastest form by kind of job."""
    jobs = {"prompts": PROMPTS_ONLY, "replies": 0.0, "a chat": CHAT_RATIO}
    return {job: fastest_form(ratio, median_speeds(runs)).value for job, ratio in jobs.items()}


def _rate(rates: list[float]) -> str:
    return f"{statistics.median(rates):.2f} ± {deviation(rates):.2f}"
