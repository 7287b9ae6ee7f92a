"""What was measured as Markdown, JSON or CSV. The fields are llama-bench's where they mean the same.

Its fields that say nothing of our engine are left out; ours come behind its own.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from dsmoe_local import __version__
from dsmoe_local.base.sizes import format_count, format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.evaluate.speed.machine import Machine
from dsmoe_local.evaluate.speed.results import ModelSpeed, Speed, deviation

Record: TypeAlias = dict[str, Any]

_FLASH = {"auto": -1, "off": 0, "on": 1}
_SAMPLES = ("samples_ns", "samples_ts")
_KIB = 1024
_MOST_PATH = 4096


def records(machine: Machine, models: Iterable[ModelSpeed]) -> list[Record]:
    """One object for each model and workload."""
    return [_record(machine, model, speed) for model in models for speed in model.speeds]


def _record(machine: Machine, model: ModelSpeed, speed: Speed) -> Record:
    info, options, workload = model.info, model.options, speed.workload
    return {
        "cpu_info": machine.cpu,
        "backends": ",".join(model.devices) or "CPU",
        "model_filename": safe_line(str(info.path), _MOST_PATH),
        "model_type": _type(model),
        "model_size": info.n_bytes,
        "model_n_params": info.n_parameters,
        "n_batch": options.n_batch,
        "n_ubatch": options.n_ubatch,
        "n_threads": info.n_threads,
        "type_k": options.cache_type_k,
        "type_v": options.cache_type_v,
        "no_kv_offload": not options.offload_cache,
        "flash_attn": _FLASH[options.flash_attention],
        "n_prompt": workload.n_prompt,
        "n_gen": workload.n_gen,
        "n_depth": workload.n_depth,
        "test_time": speed.began.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.fmean(speed.samples_ns)),
        "stddev_ns": round(deviation(list(map(float, speed.samples_ns)))),
        "avg_ts": speed.rate,
        "stddev_ts": speed.deviation,
        # From here on the fields are ours.
        "n_threads_batch": options.n_threads_batch or info.n_threads,
        "n_context": info.n_context,
        "placement": info.placement,
        "n_experts": info.n_routed_experts,
        "n_experts_used": info.n_experts_per_token,
        "n_params_active": model.reads.n_activated,
        "load_seconds": round(model.load_seconds, 3),
        "peak_memory": model.peak_bytes,
        "weight_bytes_per_token": round(model.reads.n_bytes),
        "read_bytes_per_token": _rounded(speed.n_bytes_per_token),
        "read_bytes_per_second": _rounded(speed.bytes_per_second),
        "memory_bytes_per_second": round(machine.bandwidth.bytes_per_second),
        "memory_share": model.share_of(speed, machine.bandwidth),
        "load_average_before": round(machine.load, 2),
        "version": __version__,
        _SAMPLES[0]: list(speed.samples_ns),
        _SAMPLES[1]: speed.samples,
    }


def as_json(machine: Machine, models: Sequence[ModelSpeed]) -> str:
    """An array of the records."""
    return json.dumps(records(machine, models), indent=2, ensure_ascii=True)


def as_csv(machine: Machine, models: Sequence[ModelSpeed]) -> str:
    """The records without their samples, all fields in quotes; what is not known is empty."""
    rows = [
        {name: value for name, value in record.items() if name not in _SAMPLES}
        for record in records(machine, models)
    ]
    out = io.StringIO()
    if rows:
        # The names as llama-bench writes them, without quotes.
        out.write(",".join(rows[0]) + "\n")
        writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerows([_cell(value) for value in row.values()] for row in rows)
    return out.getvalue().rstrip("\n")


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return f"{value:.6f}"
    return "" if value is None else value


def as_markdown(machine: Machine, models: Sequence[ModelSpeed]) -> str:
    """llama-bench's table, then one of what explains it, then the machine."""
    return "\n\n".join([*tables(machine, models), about(machine)])


def tables(machine: Machine, models: Sequence[ModelSpeed]) -> list[str]:
    """Both tables, without what is empty."""
    return [table for table in (_speed_table(models), _cost_table(machine, models)) if table]


Column: TypeAlias = tuple[str, bool, Callable[[ModelSpeed, Speed], str]]
"""Heading, whether it is of numbers, and a row's text."""

_SPEED: tuple[Column, ...] = (
    ("model", False, lambda model, _: name_of(model)),
    ("type", False, lambda model, _: _type(model)),
    ("size", True, lambda model, _: _binary_size(model.info.n_bytes)),
    ("params", True, lambda model, _: _parameters(model.info.n_parameters)),
    ("experts", True, lambda model, _: _experts(model)),
    ("backend", False, lambda model, _: ",".join(model.devices) or "CPU"),
    ("threads", True, lambda model, _: _threads(model)),
    ("test", True, lambda _, speed: speed.workload.label),
    ("t/s", True, lambda _, speed: f"{speed.rate:.2f} ± {speed.deviation:.2f}"),
)


def _speed_table(models: Sequence[ModelSpeed]) -> str:
    rows = [[text(model, speed) for *_, text in _SPEED] for model in models for speed in model.speeds]
    return _table([(heading, numbers) for heading, numbers, _ in _SPEED], rows)


def _cost_table(machine: Machine, models: Sequence[ModelSpeed]) -> str:
    """A row for each reply that was timed; of a model without one, a row for the model."""
    names = ["active", "load", "memory", "test", "read/token", "GB/s", "of bandwidth"]
    if len(models) > 1:
        names.append("speed")
    rows = []
    for model in models:
        own = [name_of(model), format_count(model.reads.n_activated), _seconds(model.load_seconds)]
        own.append("" if model.peak_bytes is None else format_size(model.peak_bytes))
        replies = [speed for speed in model.speeds if speed.n_bytes_per_token is not None]
        rows += [own + _reading(machine, models, model, speed) for speed in replies]
        if not replies:
            rows.append([*own, "", format_size(model.reads.n_bytes), "", "", ""])
    headings = [("model", False), *((name, True) for name in names)]
    return _table(headings, [row[: len(headings)] for row in rows])


def _reading(machine: Machine, models: Sequence[ModelSpeed], model: ModelSpeed, speed: Speed) -> list[str]:
    assert speed.n_bytes_per_token is not None
    assert speed.bytes_per_second is not None
    share = model.share_of(speed, machine.bandwidth)
    return [
        speed.workload.label,
        format_size(speed.n_bytes_per_token),
        f"{speed.bytes_per_second / 1e9:.1f}",
        "" if share is None else f"{share:.0%}",
        "1.00 x" if model is models[0] else beside(models[0], speed),
    ]


def beside(first: ModelSpeed, speed: Speed) -> str:
    """A speed by the first model's in the same test, and how far both deviations make that uncertain; empty
    without such a test.
    """
    other = next((each for each in first.speeds if each.workload == speed.workload), None)
    if other is None:
        return ""
    ratio = speed.rate / other.rate
    error = ratio * math.hypot(speed.deviation / speed.rate, other.deviation / other.rate)
    return f"{ratio:.2f} ± {error:.2f} x"


def about(machine: Machine) -> str:
    """The machine, in two lines at most."""
    bandwidth = machine.bandwidth
    threads = f"{bandwidth.n_threads} thread{'s' if bandwidth.n_threads > 1 else ''}"
    speed = f"{bandwidth.bytes_per_second / 1e9:.1f} GB/s read by {threads}"
    lines = [f"memory: {speed}, the fastest pass over {format_size(bandwidth.n_bytes)}; {machine.cpu}"]
    if bandwidth.cache_bytes:
        cache = format_size(bandwidth.cache_bytes)
        lines.append(
            f"(A model that reads less than the cache, {cache}, per token can be faster than memory.)"
        )
    return "\n".join(lines)


def _table(headings: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned as they are."""
    if not rows:
        return ""
    widths = [
        max(len(heading), 3, *(len(row[at]) for row in rows)) for at, (heading, _) in enumerate(headings)
    ]
    numbers = [is_number for _, is_number in headings]

    def line(cells: Iterable[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numbers, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = ("-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numbers, strict=True))
    return "\n".join([line(heading for heading, _ in headings), line(rule), *map(line, rows)])


def name_of(model: ModelSpeed) -> str:
    """The file's, as a cell may hold it."""
    return safe_line(model.info.path.stem, 60).replace("|", "\\|")


def model_facts(model: ModelSpeed) -> list[str]:
    """The columns of the first table that are the same for all tests of a model, in words."""
    threads = _threads(model)
    return [
        _type(model),
        _binary_size(model.info.n_bytes),
        f"{_parameters(model.info.n_parameters)} parameters",
        f"{_experts(model)} experts" if model.info.n_routed_experts else _experts(model),
        ",".join(model.devices) or "CPU",
        f"{threads} thread{'' if threads == '1' else 's'}",
    ]


def _type(model: ModelSpeed) -> str:
    size = format_count(model.info.n_parameters)
    return safe_line(f"{model.info.architecture} {size} {model.reads.type}", 60)


def _experts(model: ModelSpeed) -> str:
    info = model.info
    return f"{info.n_experts_per_token} of {info.n_routed_experts}" if info.n_routed_experts else "dense"


def _threads(model: ModelSpeed) -> str:
    own, batch = model.info.n_threads, model.options.n_threads_batch
    return str(own) if batch in (None, own) else f"{own}, {batch}"


def _binary_size(n_bytes: int) -> str:
    """As llama-bench writes it."""
    return f"{n_bytes / _KIB**3:.2f} GiB" if n_bytes >= _KIB**3 else f"{n_bytes / _KIB**2:.2f} MiB"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


FORMATS: Mapping[str, Callable[[Machine, Sequence[ModelSpeed]], str]] = {
    "md": as_markdown,
    "json": as_json,
    "csv": as_csv,
}
