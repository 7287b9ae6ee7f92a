"""What was measured, for a terminal: the tables if they fit into it, else a paragraph for each model."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from dsmoe_local.base.sizes import format_count, format_size
from dsmoe_local.evaluate.speed.machine import Machine
from dsmoe_local.evaluate.speed.output import about, beside, model_facts, name_of, tables
from dsmoe_local.evaluate.speed.results import ModelSpeed, Speed


def as_text(machine: Machine, models: Sequence[ModelSpeed], width: int) -> str:
    """Lines of at most `width` columns, as far as no word is longer; none is broken."""
    parts = tables(machine, models)
    if any(len(line) > width for part in parts for line in part.splitlines()):
        parts = ["\n".join(_paragraph(machine, models, model, width)) for model in models]
    parts.append(
        "\n".join(line for each in about(machine).splitlines() for line in _wrapped(each, width, ""))
    )
    return "\n\n".join(parts)


def _paragraph(
    machine: Machine, models: Sequence[ModelSpeed], model: ModelSpeed, width: int
) -> Iterator[str]:
    yield name_of(model)
    facts = [
        *model_facts(model),
        f"{format_count(model.reads.n_activated)} active",
        f"loaded in {model.load_seconds:.2f} s",
    ]
    if model.peak_bytes is not None:
        facts.append(f"{format_size(model.peak_bytes)} of memory")
    yield from _wrapped(", ".join(facts), width, "  ")
    longest = max(len(speed.workload.label) for speed in model.speeds)
    for speed in model.speeds:
        told = ", ".join(_about_speed(machine, models, model, speed))
        yield from _wrapped(f"{speed.workload.label.ljust(longest)}  {told}", width, "  ")


def _about_speed(
    machine: Machine, models: Sequence[ModelSpeed], model: ModelSpeed, speed: Speed
) -> Iterator[str]:
    yield f"{speed.rate:.2f} ± {speed.deviation:.2f} t/s"
    if speed.n_bytes_per_token is not None and speed.bytes_per_second is not None:
        yield f"{format_size(speed.n_bytes_per_token)} read per token"
        yield f"{speed.bytes_per_second / 1e9:.1f} GB/s"
        share = model.share_of(speed, machine.bandwidth)
        if share is not None:
            yield f"{share:.0%} of bandwidth"
    if len(models) > 1 and model is not models[0] and (ratio := beside(models[0], speed)):
        yield f"{ratio} the first model's speed"


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
