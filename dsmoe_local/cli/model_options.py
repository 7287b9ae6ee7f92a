"""Options of the commands that run a model, in llama.cpp's spelling, and the `ModelOptions` made of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.cli.option_sources import settle, source_in_errors
from dsmoe_local.cli.options import (
    FILE,
    FLAG,
    NUMBER,
    Group,
    all_of,
    choice,
    option,
    parsed,
    text_value,
    typed,
)
from dsmoe_local.cli.progress import run_with_progress

if TYPE_CHECKING:
    import threading

    from dsmoe_local.engine.process.client import EngineClient
    from dsmoe_local.engine.types import ModelOptions

F = TypeVar("F", bound=Callable[..., Any])

WINDOW_TOKENS = 512
"""The usual window of `dsmoe eval` and `dsmoe imatrix`, as in llama.cpp's tools."""


def _layer_count(text: str) -> int | None:
    """Read a number of layers, `all` (-1) or `auto` (None)."""
    word = text.lower()
    if word in ("auto", "all"):
        return None if word == "auto" else -1
    if not (word.isascii() and word.isdigit()):
        raise ValueError(f"{text!r} is not a number, auto or all")
    return int(word)


def _tensor_overrides(text: str) -> tuple[tuple[str, str], ...]:
    """Read REGEX=BUFFER, or several of them separated by commas, as pairs. A REGEX may contain commas."""
    pairs = re.findall(r"(.+?)=([^=,]+)(?:,|$)", text)
    if ",".join(map("=".join, pairs)) != text:
        raise ValueError(f"{text!r} is not REGEX=BUFFER")
    return tuple(pairs)


def _device_list(text: str) -> tuple[str, ...]:
    """Read names of devices separated by commas; an empty tuple for `none`."""
    names = tuple(name.strip() for name in text.split(","))
    if names == ("none",):
        return ()
    if not all(names):
        raise ValueError(f"{text!r} is not a list of devices")
    return names


def _worker_list(text: str) -> tuple[str, ...]:
    """Read addresses of workers separated by commas."""
    from dsmoe_local.engine.workers import parse_workers

    texts = tuple(part.strip() for part in text.split(","))
    parse_workers(texts)
    return texts


_context_option = option(
    "-c, --ctx-size",
    "n_context",
    "Context in tokens, at most what the model was trained for.",
    NUMBER,
    shown="what fits",
)

window_option = option(
    "-c, --ctx-size",
    "n_context",
    "Window in tokens.",
    NUMBER,
    default=WINDOW_TOKENS,
    # At the top level of the config file, this is the context of chats.
    section_only=True,
)
"""Adds -c to commands that read a text in windows."""

_DEVICES, _ADVANCED = Group.DEVICES, Group.ADVANCED
_TYPE = text_value("TYPE")
_LAYERS = parsed(_layer_count, "N|auto|all")

_KERNELS = (
    "Weights on the CPU: repacked, as in llama.cpp, for replies; only those without tiled products repacked,"
    " for prompts; as in the file."
)
_FORMS = ("auto", "repack", "tiled", "plain")

# `engine.types.ModelOptions` has the same defaults; it takes too long to import for --help.
_loading_options = all_of(
    option(
        "-ngl, --gpu-layers, --n-gpu-layers",
        "n_gpu_layers",
        "Layers to offload to the GPU.",
        _LAYERS,
        _DEVICES,
        shown="auto: what fits",
    ),
    option(
        "-ncmoe, --n-cpu-moe",
        "n_cpu_moe",
        "Keep the routed experts of the first N layers in main memory.",
        _LAYERS,
        _DEVICES,
        shown="auto: those that do not fit",
    ),
    option("-cmoe, --cpu-moe", "cpu_moe", "Keep all routed experts in main memory.", FLAG, _DEVICES),
    option(
        "-dev, --device",
        "devices",
        "Devices from `dsmoe devices`, separated by commas; none = CPU only.",
        parsed(_device_list, "LIST"),
        _DEVICES,
        shown="all",
    ),
    option(
        "--rpc",
        "workers",
        "Machines that run `dsmoe worker` get the layers that do not fit here. SIZE limits their memory.",
        parsed(_worker_list, "HOST:PORT[=SIZE],…"),
        _DEVICES,
    ),
    option(
        "-ot, --tensor-override, --override-tensor",
        "tensor_overrides",
        "Place tensors whose names match in a buffer: CPU, or a device. Repeatable; the first match wins.",
        parsed(_tensor_overrides, "REGEX=BUFFER"),
        _DEVICES,
        multiple=True,
    ),
    option("-nkvo, --no-kv-offload", "keep_cache", "Keep the KV cache in main memory.", FLAG, _DEVICES),
    option("-ctk, --cache-type-k", "cache_type_k", "Type of the K cache.", _TYPE, _DEVICES, default="f16"),
    option(
        "-ctv, --cache-type-v",
        "cache_type_v",
        "Type of the V cache. With MLA it must be that of the K cache.",
        _TYPE,
        _DEVICES,
        default="f16",
    ),
    option("-t, --threads", "n_threads", "Threads for decoding.", NUMBER, _DEVICES, shown="physical cores"),
    option(
        "-tb, --threads-batch", "n_threads_batch", "Threads for prompts.", NUMBER, _DEVICES, shown="as -t"
    ),
    option(
        "--active-experts",
        "n_experts_per_token",
        "Routed experts per token.",
        NUMBER,
        _ADVANCED,
        shown="the model's own number",
    ),
    option(
        "--chat-template",
        "chat_template",
        "A file with a chat template, one of several in the model, or a built-in one: deepseek-moe, chatml."
        " none: the model completes text.",
        typed(click.Path(), "FILE|NAME"),
        _ADVANCED,
        shown="the model's own",
    ),
    option(
        "-fa, --flash-attn",
        "flash_attention",
        "Flash attention. auto: where it is faster, or saves much memory.",
        choice("auto", "on", "off"),
        _ADVANCED,
        default="auto",
    ),
    option("-b, --batch-size", "n_batch", "Logical batch size in tokens.", NUMBER, _ADVANCED, default=2048),
    option(
        "-ub, --ubatch-size",
        "n_ubatch",
        "Physical batch size (ubatch) in tokens.",
        NUMBER,
        _ADVANCED,
        default=512,
    ),
    option("--log-file", "log_file", "Append llama.cpp's log to a file.", FILE, _ADVANCED),
)

COMPARE_KERNELS = "compare"
"""The value of --kernels without a value, in `benchmark_model_options`."""

model_options_without_context = all_of(
    _loading_options,
    option(
        "--kernels",
        "kernels",
        _KERNELS,
        choice(*_FORMS),
        _ADVANCED,
        default="auto",
        shown="auto: what suits the job",
    ),
)
"""Adds the options about loading a model, for commands with their own -c."""

benchmark_model_options = all_of(
    _loading_options,
    option(
        "--kernels",
        "kernels",
        f"{_KERNELS} Without a value: compare them.",
        choice(*_FORMS, COMPARE_KERNELS),
        _ADVANCED,
        default="auto",
        is_flag=False,
        flag_value=COMPARE_KERNELS,
    ),
)
"""Adds the same, with --kernels for `dsmoe bench`."""

model_options = all_of(_context_option, model_options_without_context)
"""Adds -c and the options about loading a model."""


def check_window(n_context: int) -> None:
    """Raise UsageError if a window is too short to be scored."""
    from dsmoe_local.evaluate.windows import MIN_CONTEXT

    with source_in_errors("n_context"):
        if n_context < MIN_CONTEXT:
            raise UsageError(
                f"-c {n_context} is out of range", remedy=f"a window has {MIN_CONTEXT} tokens or more"
            )


def within_training(options: ModelOptions) -> ModelOptions:
    """Return `options` with the context limited by `trained_context`; a note reports the limit."""
    from dsmoe_local.model.gguf_model import trained_context

    if options.n_context is None:
        return options
    n_context = trained_context(options.path, options.n_context)
    if n_context < options.n_context:
        click.echo(
            f"note: -c {options.n_context} is reduced to {n_context}: the model was trained for no more",
            err=True,
        )
    return replace(options, n_context=n_context)


def load_engine(
    path: Path,
    values: dict[str, Any],
    complete: Callable[[ModelOptions], ModelOptions] = within_training,
    stop: threading.Event | None = None,
) -> EngineClient:
    """Load the model at `path` in a process of its own, with progress on the screen.

    Removes the options about loading from `values`. `complete` sets what the user does not choose. `stop`
    also interrupts the loads that follow a crash.
    """
    from dsmoe_local.engine.process.client import EngineClient
    from dsmoe_local.model.discovery import note_use

    log_file: Path | None = values.pop("log_file")
    options = complete(loading_options(path, values))
    engine = run_with_progress(
        lambda listen, stop: EngineClient.load(options, listen, stop, log_file=log_file), stop
    )
    note_use(path)
    return engine


_SAME_NAMES = (
    "n_threads",
    "n_threads_batch",
    "n_batch",
    "n_ubatch",
    "n_gpu_layers",
    "devices",
    "flash_attention",
    "kernels",
    "cache_type_k",
    "cache_type_v",
    "n_experts_per_token",
    "chat_template",
)
"""Parameters that are fields of ModelOptions as they are."""


def loading_options(path: Path, values: dict[str, Any]) -> ModelOptions:
    """Return the options for loading `path`, and remove them from `values`. UsageError for a conflict."""
    from dsmoe_local.engine.types import ALL_LAYERS, ModelOptions

    ways = {name: values.pop(name) for name in ("cpu_moe", "n_cpu_moe")}
    settled = settle(ways, ("cpu_moe",), ("n_cpu_moe",))
    return ModelOptions(
        path=path,
        # As in llama.cpp, 0 means what the model was trained for.
        n_context=values.pop("n_context") or None,
        n_cpu_moe=ALL_LAYERS if settled["cpu_moe"] else settled["n_cpu_moe"],
        tensor_overrides=tuple(pair for pairs in values.pop("tensor_overrides") for pair in pairs),
        offload_cache=not values.pop("keep_cache"),
        workers=values.pop("workers") or (),
        **{name: values.pop(name) for name in _SAME_NAMES},
    )
