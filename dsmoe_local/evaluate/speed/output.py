"""Writes measured speeds as Markdown, JSON, CSV, or text for a narrow terminal.

JSON and CSV have the fields of llama-bench that apply to this engine, followed by additional ones.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from dsmoe_local import __version__
from dsmoe_local.base.sizes import format_count, format_size
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.evaluate.speed.machine import Machine
from dsmoe_local.evaluate.speed.results import ModelSpeed, Speed, deviation
from dsmoe_local.model.split_name import model_stem

Record: TypeAlias = dict[str, Any]

_FLASH = {"auto": -1, "off": 0, "on": 1}
_SAMPLES = ("samples_ns", "samples_ts")
_KIB = 1024
_MAX_PATH = 4096


def records(machine: Machine, models: Iterable[ModelSpeed]) -> list[Record]:
    """Return a record for each model and workload."""
    return [_record(machine, model, speed) for model in models for speed in model.speeds]


def _record(machine: Machine, model: ModelSpeed, speed: Speed) -> Record:
    info, options, workload = model.info, model.options, speed.workload
    return {
        "cpu_info": machine.cpu,
        "backends": ",".join(model.devices) or "CPU",
        "model_filename": safe_line(str(info.path), _MAX_PATH),
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
        # Fields that llama-bench does not have.
        "n_threads_batch": options.n_threads_batch or info.n_threads,
        "n_context": info.n_context,
        "placement": info.placement,
        "kernels": info.kernels,
        "kernels_reason": info.kernels_reason,
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


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def as_json(machine: Machine, models: Sequence[ModelSpeed]) -> str:
    """Return the records as a JSON array."""
    return json.dumps(records(machine, models), indent=2, ensure_ascii=True)


def as_csv(machine: Machine, models: Sequence[ModelSpeed]) -> str:
    """Return the records without their samples as CSV. All values are quoted; unknown ones are empty."""
    rows = records(machine, models)
    if not rows:
        return ""
    names = [name for name in rows[0] if name not in _SAMPLES]
    out = io.StringIO()
    # llama-bench quotes all fields but the names.
    out.write(",".join(names) + "\n")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([_cell(row[name]) for name in names] for row in rows)
    return out.getvalue().rstrip("\n")


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return f"{value:.6f}"
    return "" if value is None else value


class _Row(NamedTuple):
    """A row of a table: a model, one of its speeds or None, and `first`, the model to compare it with."""

    machine: Machine
    first: ModelSpeed
    model: ModelSpeed
    speed: Speed | None


class _Column(NamedTuple):
    """A column of a table. `text` returns the text of a row's cell."""

    heading: str
    is_number: bool
    text: Callable[[_Row], str]


def _rate(row: _Row) -> str:
    return f"{row.speed.rate:.2f} ± {row.speed.deviation:.2f}" if row.speed else ""


def _share(row: _Row) -> str:
    share = None if row.speed is None else row.model.share_of(row.speed, row.machine.bandwidth)
    return "" if share is None else f"{share:.0%}"


def _bytes_per_token(row: _Row) -> str:
    """Return the bytes that a token of a reply reads. Without a measured reply, only those of the weights."""
    if row.speed is None:
        return format_size(row.model.reads.n_bytes)
    return "" if row.speed.n_bytes_per_token is None else format_size(row.speed.n_bytes_per_token)


def _bytes_per_second(row: _Row) -> str:
    rate = None if row.speed is None else row.speed.bytes_per_second
    return "" if rate is None else f"{rate / 1e9:.1f}"


def _relative_speed(row: _Row) -> str:
    """Return the speed relative to the first model in the same test, with the propagated error."""
    speed = row.speed
    if speed is None:
        return ""
    if row.model is row.first:
        return "1.00 x"
    other = next((each for each in row.first.speeds if each.workload == speed.workload), None)
    if other is None:
        return ""
    ratio = speed.rate / other.rate
    error = ratio * math.hypot(speed.deviation / speed.rate, other.deviation / other.rate)
    return f"{ratio:.2f} ± {error:.2f} x"


def _peak(row: _Row) -> str:
    return "" if row.model.peak_bytes is None else format_size(row.model.peak_bytes)


_NAME = _Column("model", False, lambda row: _name(row.model))
_TEST = _Column("test", True, lambda row: row.speed.workload.label if row.speed else "")
_RATE = _Column("t/s", True, _rate)
_MODEL = (
    _Column("type", False, lambda row: _type(row.model)),
    _Column("size", True, lambda row: _binary_size(row.model.info.n_bytes)),
    _Column("params", True, lambda row: _parameters(row.model.info.n_parameters)),
    _Column("experts", True, lambda row: _experts(row.model)),
    _Column("backend", False, lambda row: ",".join(row.model.devices) or "CPU"),
    _Column("threads", True, lambda row: _threads(row.model)),
)
_LOADED = (
    _Column("active", True, lambda row: format_count(row.model.reads.n_activated)),
    _Column("load", True, lambda row: f"{row.model.load_seconds:.2f} s"),
    _Column("memory", True, _peak),
)
_READ = (
    _Column("read/token", True, _bytes_per_token),
    _Column("GB/s", True, _bytes_per_second),
    _Column("of bandwidth", True, _share),
)
_RELATIVE = _Column("speed", True, _relative_speed)


def as_markdown(machine: Machine, models: Sequence[ModelSpeed]) -> str:
    """Return a table like llama-bench's, a table of the bytes read, and lines about kernels and machine."""
    return "\n\n".join([*_tables(machine, models), _about(machine, models)])


def as_text(machine: Machine, models: Sequence[ModelSpeed], width: int) -> str:
    """Return the Markdown if it fits into `width` columns, else a paragraph for each model.

    Words are not broken, so a line with a single long word may be wider.
    """
    parts = _tables(machine, models)
    if any(len(line) > width for part in parts for line in part.splitlines()):
        parts = ["\n".join(_paragraph(machine, models, model, width)) for model in models]
    about = [line for each in _about(machine, models).splitlines() for line in _wrapped(each, width, "")]
    return "\n\n".join([*parts, "\n".join(about)])


def _tables(machine: Machine, models: Sequence[ModelSpeed]) -> list[str]:
    speeds = [_Row(machine, models[0], model, speed) for model in models for speed in model.speeds]
    replies: list[_Row] = []
    for model in models:
        timed: list[Speed | None] = [s for s in model.speeds if s.n_bytes_per_token is not None]
        replies += [_Row(machine, models[0], model, speed) for speed in timed or [None]]
    relative = (_RELATIVE,) if len(models) > 1 else ()
    return [
        _table((_NAME, *_MODEL, _TEST, _RATE), speeds),
        _table((_NAME, *_LOADED, _TEST, *_READ, *relative), replies),
    ]


def _table(columns: Sequence[_Column], rows: Sequence[_Row]) -> str:
    return markdown_table(
        [(column.heading, column.is_number) for column in columns],
        [[column.text(row) for column in columns] for row in rows],
    )


def markdown_table(columns: Sequence[tuple[str, bool]], cells: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with padded columns. A column is its heading, and whether it has numbers."""
    widths = [
        max(len(heading), 3, *(len(row[number]) for row in cells))
        for number, (heading, _) in enumerate(columns)
    ]

    def line(texts: Iterable[str]) -> str:
        padded = (
            text.rjust(width) if is_number else text.ljust(width)
            for text, width, (_, is_number) in zip(texts, widths, columns, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + (":" if is_number else "-")
        for width, (_, is_number) in zip(widths, columns, strict=True)
    ]
    return "\n".join([line(heading for heading, _ in columns), line(rule), *map(line, cells)])


def _paragraph(
    machine: Machine, models: Sequence[ModelSpeed], model: ModelSpeed, width: int
) -> Iterator[str]:
    """Yield the lines of a model's paragraph: the cells of both tables, each with its heading."""
    yield _name(model)
    row = _Row(machine, models[0], model, None)
    yield from _wrapped(_with_headings((*_MODEL, *_LOADED), row), width, "  ")
    relative = (_RELATIVE,) if len(models) > 1 else ()
    longest = max(len(speed.workload.label) for speed in model.speeds)
    for speed in model.speeds:
        cells = _with_headings((*_READ, *relative), row._replace(speed=speed))
        text = f"{_RATE.text(row._replace(speed=speed))} t/s{', ' if cells else ''}{cells}"
        yield from _wrapped(f"{speed.workload.label.ljust(longest)}  {text}", width, "  ")


def _with_headings(columns: Iterable[_Column], row: _Row) -> str:
    cells = ((column.heading, column.text(row)) for column in columns)
    return ", ".join(f"{heading} {text}" for heading, text in cells if text)


def _about(machine: Machine, models: Sequence[ModelSpeed]) -> str:
    bandwidth = machine.bandwidth
    threads = count(bandwidth.n_threads, "thread")
    speed = f"{bandwidth.bytes_per_second / 1e9:.1f} GB/s read by {threads}"
    lines = [f"memory: {speed}, the fastest pass over {format_size(bandwidth.n_bytes)}; {machine.cpu}"]
    if bandwidth.cache_bytes:
        cache = format_size(bandwidth.cache_bytes)
        lines.append(
            f"(A model that reads less per token than the cache, {cache}, can exceed the bandwidth.)"
        )
    lines += [
        f"kernels of {safe_line(model_stem(model.info.path), 60)}: {model.info.kernels}"
        f" ({model.info.kernels_reason})"
        for model in models
    ]
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _name(model: ModelSpeed) -> str:
    """Return the name of the model's file, escaped for a table."""
    return safe_line(model_stem(model.info.path), 60).replace("|", "\\|")


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
    """Return a size in llama-bench's format."""
    return f"{n_bytes / _KIB**3:.2f} GiB" if n_bytes >= _KIB**3 else f"{n_bytes / _KIB**2:.2f} MiB"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


FORMATS: Mapping[str, Callable[[Machine, Sequence[ModelSpeed]], str]] = {
    "md": as_markdown,
    "json": as_json,
    "csv": as_csv,
}
