"""`dsmoe plan`: what a model would need on several machines, and how fast it would be."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.sizes import format_size, parse_size
from dsmoe_local.base.text import count, safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import find_model, model_argument, model_option
from dsmoe_local.cli.options import COUNT, json_option, option, parsed, text_value
from dsmoe_local.cli.output import console, plain_table, print_json
from dsmoe_local.cli.progress import run_with_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dsmoe_local.engine.load.split_plan import Machine, SplitPlan
    from dsmoe_local.model.gguf_file import GgufFile
    from dsmoe_local.model.hyperparameters import ModelOutline

_COLUMNS = {
    "machine": 0,
    "layers": 0,
    "weights": 0,
    "KV cache": 0,
    "buffers": 76,
    "free": 80,
    "read": 0,
    "ms/token": 68,
}
"""The columns of the table of machines, and the least width of the terminal for each. `read` is per token."""
_SMALLEST_MIX = "Q3_K_S"
_LEAST_SIZE = 10**6
_LEAST_SHARE = 0.5  # of the memory bandwidth that decoding uses; the most is all of it


def _size_list(text: str) -> tuple[int, ...]:
    """Read sizes separated by commas."""
    return tuple(parse_size(part.strip().removesuffix("/s"), _LEAST_SIZE) for part in text.split(","))


_SIZES = parsed(_size_list, "SIZE,…")


@define_command(
    "plan",
    ("dsmoe plan deepseek-v3 --memory 256GiB,96GiB", "Plan a published model."),
    ("dsmoe plan model.gguf --memory 8GiB,8GiB", "Plan a file for two machines."),
)
@model_argument("target", "[MODEL|PRESET]", required=False)
@model_option
@option("--memory", "memory", "Memory for the model on each machine, this one first.", _SIZES, required=True)
@option(
    "--read-speed",
    "speeds",
    "What decoding reads per second on each machine; the last one is also that of any others.",
    _SIZES,
    shown="measured on this machine",
)
@option(
    "--bandwidth",
    "bandwidth",
    "Of the network: 1GbE, 100Mbit/s, 40MB/s, WiFi, …",
    text_value("SPEED"),
    default="1GbE",
)
@option(
    "--type",
    "word",
    "Type to which the weights would be quantized.",
    text_value("TYPE"),
    shown="that of the file; q4 for a preset",
    section_only=True,
)
@option(
    "-c, --ctx-size",
    "n_context",
    "Context in tokens, with a KV cache in F16.",
    COUNT,
    default=4096,
    # At the top level of the config file, this is the context of chats.
    section_only=True,
)
@json_option()
def command(
    target: str | None,
    named_model: str | None,
    memory: tuple[int, ...],
    speeds: tuple[int, ...] | None,
    bandwidth: str,
    word: str | None,
    n_context: int,
    as_json: bool,
) -> None:
    """Show where the layers of a model would be on machines with workers, and the speed to expect.

    This machine is filled first, as with `--rpc`. MODEL is a GGUF file or a name that `dsmoe models` lists.
    PRESET is a published model; `dsmoe inspect --help` lists them. No weights are needed.
    """
    from dsmoe_local.engine.load.network import parse_network
    from dsmoe_local.engine.load.split_plan import plan_split

    network = parse_network(bandwidth)
    if speeds and len(speeds) > len(memory):
        raise UsageError(
            f"--read-speed has {len(speeds)} values, --memory {len(memory)}", remedy="leave some out"
        )
    file, outline, title = _model(target, named_model, word)
    machines, about_speed = _machines(memory, speeds)
    plan = _plan(lambda each: plan_split(each, outline, machines, network, n_context), file, outline)
    if as_json:
        print_json(_as_json(plan), indent=2)
    else:
        _show(plan, f"{title}, {count(n_context, 'token')} of context", about_speed, bandwidth, n_context)


def _model(
    target: str | None, named_model: str | None, word: str | None
) -> tuple[GgufFile, ModelOutline, str]:
    """Return the header of a model with the types that it would have, its outline, and its name and type."""
    from dsmoe_local.engine.load.split_plan import header_of
    from dsmoe_local.model.file_type import file_type_name
    from dsmoe_local.model.ggml import GgmlType
    from dsmoe_local.model.gguf_model import read_any_model
    from dsmoe_local.model.layout import unquantized
    from dsmoe_local.model.presets import PRESETS

    preset = PRESETS.get((target or "").lower())
    if preset is None:
        file, outline = read_any_model(find_model(target, named_model, PRESETS))
        type_name = file_type_name(file)
    else:
        outline = preset.hp
        file, type_name = header_of(preset.hp, unquantized(preset.hp, GgmlType.BF16)), ""
        word = word or "q4"
    if word is not None:
        file, type_name = _quantized(file, outline, word), word
    name = safe_line(outline.name, 60) or safe_line(file.path.name, 60)
    return file, outline, f"{name} in {safe_line(type_name, 40)}"


def _quantized(file: GgufFile, outline: ModelOutline, word: str) -> GgufFile:
    """Return the header of a file with its tensors in another type. Raises UsageError."""
    from dsmoe_local.engine.load.split_plan import header_of
    from dsmoe_local.model.architectures import no_table
    from dsmoe_local.model.gguf_model import loaded_tensors
    from dsmoe_local.model.hyperparameters import Hyperparameters
    from dsmoe_quantize.policy.plan import plan_types
    from dsmoe_quantize.policy.types import resolve

    if not isinstance(outline, Hyperparameters):
        raise no_table("--type", outline.architecture, file.path)
    return header_of(outline, plan_types(loaded_tensors(file, outline), outline, resolve(word)).choices)


def _machines(memory: Sequence[int], speeds: Sequence[int] | None) -> tuple[list[Machine], str]:
    """Return the machines, and a sentence about the speeds at which they read."""
    from dsmoe_local.engine.load.machine import physical_cores
    from dsmoe_local.engine.load.split_plan import Machine
    from dsmoe_local.evaluate.speed.machine import measure_bandwidth

    if speeds:
        each = [*speeds, *[speeds[-1]] * (len(memory) - len(speeds))]
        words = ", ".join(f"{format_size(speed)}/s" for speed in each)
        return [Machine(size, (speed, speed)) for size, speed in zip(memory, each, strict=True)], (
            f"Decoding reads {words}, as given."
        )
    measured = run_with_progress(lambda listen, stop: measure_bandwidth(physical_cores(), listen, stop))
    most = measured.bytes_per_second
    least = _LEAST_SHARE * most
    return [Machine(size, (least, most)) for size in memory], (
        f"Assumed: every machine reads {format_size(least)} to {format_size(most)} per second. The memory of "
        "this machine was measured; decoding uses half of its bandwidth or more (--read-speed)."
    )


def _plan(plan_file: Callable[[GgufFile], SplitPlan], file: GgufFile, outline: ModelOutline) -> SplitPlan:
    """Return the plan of a file. If it does not fit, the error names the largest recipe that would."""
    from dsmoe_local.engine.errors import OutOfMemoryError

    try:
        return plan_file(file)
    except OutOfMemoryError as error:
        remedy = _smaller_type(plan_file, file, outline)
        raise DsmoeError(error.what, where=error.where, remedy=remedy) from error


def _smaller_type(plan_file: Callable[[GgufFile], SplitPlan], file: GgufFile, outline: ModelOutline) -> str:
    """Return the remedy for a file that does not fit."""
    from dsmoe_local.engine.errors import OutOfMemoryError
    from dsmoe_local.model.hyperparameters import Hyperparameters
    from dsmoe_quantize.policy.named_recipes import RECIPES

    if not isinstance(outline, Hyperparameters):
        return "use a shorter context (-c), or more memory"
    files = {word: _quantized(file, outline, word) for word in (*RECIPES, _SMALLEST_MIX)}
    sizes = {word: sum(each.n_bytes for each in files[word].tensors.values()) for word in files}
    for word in sorted(sizes, key=lambda word: -sizes[word]):
        with suppress(OutOfMemoryError):
            plan_file(files[word])
            return f"--type {word} fits"
    least = min(sizes, key=lambda word: sizes[word])
    return f"no type fits: the weights take {format_size(sizes[least])} in {least}, the smallest"


def _show(plan: SplitPlan, title: str, about_speed: str, bandwidth: str, n_context: int) -> None:
    out = console()
    out.print(title)
    columns = [name for name, least in _COLUMNS.items() if out.width >= least]
    table = plain_table(*columns, left=("machine",))
    for index, share in enumerate(plan.shares):
        cells = {
            "machine": f"worker {index}" if index else "this one",
            "layers": f"{share.n_layers}",
            "weights": format_size(share.weights),
            "KV cache": format_size(share.cache),
            "buffers": format_size(share.buffers),
            "free": format_size(share.machine.n_bytes - share.n_bytes),
            "read": format_size(share.read + share.cache),
            "ms/token": _range(*(1000 * seconds for seconds in share.seconds(1.0))),
        }
        if not share.n_bytes:
            cells = {"machine": cells["machine"], "layers": "not used"}
        table.add_row(*(cells.get(name, "") for name in columns))
    out.print(table)
    if len(columns) < len(_COLUMNS):
        out.print("Wider terminals show more columns; --json prints everything.")
    out.print(about_speed)
    if plan.n_workers:
        sent = sum(share.weights for share in plan.shares[1:])
        out.print(
            f"Network, {safe_line(bandwidth, 20)}: {count(plan.n_workers, 'round trip')} and "
            f"{format_size(plan.network_bytes)} per token, "
            f"{_range(*(1000 * seconds for seconds in plan.network_seconds))} ms. "
            f"Loading sends {format_size(sent)}, {_duration(sent / plan.network.bandwidth)} each time."
        )
    else:
        out.print("It fits on this machine: workers would only make it slower.")
    out.print(
        f"Expect {_range(*plan.tokens_per_second(0.0))} tokens/s at the start of a chat, "
        f"{_range(*plan.tokens_per_second(1.0))} after {n_context:,} tokens."
    )


def _range(least: float, most: float) -> str:
    """Format a range with two digits; a single number if its ends look the same."""
    ends = dict.fromkeys(f"{end:.0f}" if end >= 10 else f"{end:.2g}" for end in (least, most))
    return " to ".join(ends)


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} s"


def _as_json(plan: SplitPlan) -> dict[str, object]:
    return {
        "machines": [
            {
                "memory_bytes": share.machine.n_bytes,
                "layers": share.n_layers,
                "output": share.has_output,
                "weights_bytes": share.weights,
                "kv_bytes": share.cache,
                "buffer_bytes": share.buffers,
                "process_bytes": share.process,
                "weight_bytes_read_per_token": share.read,
                "read_bytes_per_second": share.machine.read_speed,
                "seconds_per_token": share.seconds(1.0),
            }
            for share in plan.shares
        ],
        "round_trips_per_token": plan.n_workers,
        "network_bytes_per_token": plan.network_bytes,
        "network_seconds_per_token": plan.network_seconds,
        "tokens_per_second_at_start": plan.tokens_per_second(0.0),
        "tokens_per_second_in_full_context": plan.tokens_per_second(1.0),
    }
