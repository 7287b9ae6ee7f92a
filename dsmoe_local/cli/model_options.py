"""The options of every command that runs a model, in llama.cpp's spelling, and the objects they become."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsmoe_local.base.errors import DsmoeError, FileError, UsageError
from dsmoe_local.base.paths import demo_folder
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.configuration import (
    from_command_line,
    models_folder,
    told_origin,
)

if TYPE_CHECKING:
    import threading

    from click.shell_completion import CompletionItem

    from dsmoe_local.engine.process.client import EngineClient
    from dsmoe_local.engine.types import ModelOptions

F = TypeVar("F", bound=Callable[..., Any])

DEMO_MODEL = "demo-q4.gguf"


class ModelName(click.ParamType[str]):
    """A model: a file, or the name of a known one. What it is, `find_model` says."""

    name = "NAME|FILE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it is."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Names of known models; files where a path begins, or no name fits."""
        from click.shell_completion import CompletionItem

        from dsmoe_local.model.discovery import known_models

        wanted = incomplete.casefold()
        try:
            known = [] if os.sep in incomplete else known_models(models_folder())
        except DsmoeError:
            # The config file cannot be read: the command itself will say so.
            known = []
        names = [model.name for model in known if model.name.casefold().startswith(wanted)]
        return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


class LayerCount(click.ParamType[int | None]):
    """A number of layers, `all`, or `auto`: what fits."""

    name = "N|auto|all"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """-1 for all, None for auto."""
        word = str(value).lower()
        if word in ("auto", "all"):
            return None if word == "auto" else -1
        if not (word.isascii() and word.isdigit()):
            self.fail(f"{value!r} is not a number, auto or all", param, ctx)
        return int(word)


class TensorOverrides(click.ParamType[tuple[tuple[str, str], ...]]):
    """`-ot`: REGEX=BUFFER, several of them separated by commas. Commas within a REGEX are its own."""

    name = "REGEX=BUFFER"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, str], ...]:
        """Pairs of a pattern and a buffer's name."""
        if isinstance(value, tuple):
            return value
        pairs = re.findall(r"(.+?)=([^=,]+)(?:,|$)", str(value))
        if ",".join(map("=".join, pairs)) != value:
            self.fail(f"{value!r} is not REGEX=BUFFER", param, ctx)
        return tuple(pairs)


class DeviceList(click.ParamType[tuple[str, ...]]):
    """`-dev`: names separated by commas, or `none`."""

    name = "LIST"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The names; empty for none."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in str(value).split(","))
        if names == ("none",):
            return ()
        if not all(names):
            self.fail(f"{value!r} is not a list of devices", param, ctx)
        return names


_MODEL = [
    click.option(
        "-c",
        "--ctx-size",
        "n_context",
        type=int,
        metavar="N",
        help="Context in tokens, as far as the model was trained for [what fits].",
    ),
    click.option("-t", "--threads", "n_threads", type=int, metavar="N", help="Threads [physical cores]."),
    click.option(
        "-tb", "--threads-batch", "n_threads_batch", type=int, metavar="N", help="Threads for prompts [-t]."
    ),
    click.option("-b", "--batch-size", "n_batch", type=int, default=2048, metavar="N", help="Batch [2048]."),
    click.option(
        "-ub", "--ubatch-size", "n_ubatch", type=int, default=512, metavar="N", help="Tokens per step [512]."
    ),
    click.option(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        "n_gpu_layers",
        type=LayerCount(),
        metavar="N|auto|all",
        help="Layers on the GPU [auto: what fits].",
    ),
    click.option(
        "-ncmoe",
        "--n-cpu-moe",
        "n_cpu_moe",
        type=LayerCount(),
        metavar="N|auto|all",
        help="Keep the routed experts of the first N layers on the CPU [auto: what must].",
    ),
    click.option("-cmoe", "--cpu-moe", "cpu_moe", is_flag=True, help="Keep all routed experts on the CPU."),
    click.option(
        "-ot",
        "--tensor-override",
        "--override-tensor",
        "tensor_overrides",
        type=TensorOverrides(),
        multiple=True,
        help="Put tensors whose names match into a buffer: CPU, or a device. The first match counts.",
    ),
    click.option(
        "-dev",
        "--device",
        "devices",
        type=DeviceList(),
        help="Devices to use, as `dsmoe devices` calls them; none = the CPU alone [all].",
    ),
    click.option(
        "-nkvo", "--no-kv-offload", "keep_cache", is_flag=True, help="Keep the KV cache on the CPU."
    ),
    click.option(
        "-fa",
        "--flash-attn",
        "flash_attention",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        help="Flash attention [auto].",
    ),
    click.option(
        "-ctk", "--cache-type-k", "cache_type_k", default="f16", metavar="TYPE", help="Type of K [f16]."
    ),
    click.option(
        "-ctv", "--cache-type-v", "cache_type_v", default="f16", metavar="TYPE", help="Type of V [f16]."
    ),
    click.option(
        "--active-experts",
        "n_experts_per_token",
        type=int,
        metavar="N",
        help="Routed experts per token [the model's own number].",
    ),
    click.option(
        "--chat-template",
        "chat_template",
        type=click.Path(),
        metavar="FILE|NAME",
        help="A template file, or a built-in: deepseek-moe, chatml [the model's own].",
    ),
    click.option(
        "--log-file",
        "log_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Add llama.cpp's log to FILE.",
    ),
]


def model_option(function: F) -> F:
    """Add -m: `named_model`, for `find_model`."""
    option = click.option(
        "-m",
        "--model",
        "named_model",
        type=ModelName(),
        help="The model, a file or a name that dsmoe models lists; without one, the demo's.",
    )
    return option(function)


def model_argument(function: F) -> F:
    """Add the argument that may name a model: `model`, for `find_model`."""
    return click.argument("model", required=False, metavar="[MODEL]", type=ModelName())(function)


def model_options(function: F) -> F:
    """Add the options that say how a model is loaded."""
    return add_options(function, _MODEL)


def add_options(function: F, options: Sequence[Callable[[F], F]]) -> F:
    """Add options to a command, in the order given."""
    for option in reversed(options):
        function = option(function)
    return function


def find_model(
    argument: str | None = None, named_model: str | None = None, others: Iterable[str] = ()
) -> Path:
    """The model that a command names, by an argument or -m, as a file or by name; else the demo's, saying so.

    UsageError if none, or if the name is nobody's or several models'; FileError for a path that is no file.
    `others`: what else the command would have taken.
    """
    # An argument outweighs a -m that a variable or the config file gives.
    if argument and named_model and argument != named_model and from_command_line("named_model"):
        raise UsageError(
            f"-m names a model, and so does {safe_line(argument, 60)!r}", remedy="leave one of them out"
        )
    if argument:
        return _model_file(argument, others)
    if named_model:
        with told_origin("named_model"):
            return _model_file(named_model, others)
    demo = demo_folder() / DEMO_MODEL
    if not demo.is_file():
        raise UsageError(
            "no model is named, and the demo's is not made yet",
            remedy="name one with -m FILE.gguf, or make the demo's: dsmoe demo",
        )
    click.echo(f"note: no model named: using the demo's, {demo}", err=True)
    return demo


def within_training(options: ModelOptions) -> ModelOptions:
    """`options` with a context of at most what the model was trained for; a note tells of the difference.

    Beyond that, replies are nonsense and the cache takes what memory there is. A model whose positions are
    scaled (RoPE scaling) gets what was asked for: that is what scaling is for.
    """
    from dsmoe_local.model.gguf_model import read_model

    if options.n_context is None:
        return options
    hp = read_model(options.path)[1]
    if options.n_context <= hp.n_context or hp.rope_scaling is not None:
        return options
    click.echo(
        f"note: -c {options.n_context}: the model was trained for {hp.n_context} tokens of context, no more"
        " are used",
        err=True,
    )
    return replace(options, n_context=hp.n_context)


def load_engine(
    path: Path,
    values: dict[str, Any],
    complete: Callable[[ModelOptions], ModelOptions] = within_training,
    stop: threading.Event | None = None,
) -> EngineClient:
    """The engine for `path`, in a process of its own, loaded with progress on the screen; takes its own
    options out of `values`, and lets `complete` add what is not the user's to say. `stop` also ends the loads
    that a crash makes necessary.
    """
    from dsmoe_local.cli.render import run_with_progress
    from dsmoe_local.engine.process.client import EngineClient
    from dsmoe_local.model.discovery import note_use

    log_file: Path | None = values.pop("log_file")
    options = complete(loading_options(path, values))
    engine = run_with_progress(
        lambda listen, stop: EngineClient.load(options, listen, stop, log_file=log_file), stop
    )
    note_use(path)
    return engine


def loading_options(path: Path, values: dict[str, Any]) -> ModelOptions:
    """What the options say of how to load `path`; takes them out of `values`."""
    from dsmoe_local.engine.types import ALL_LAYERS, ModelOptions

    names = [
        "n_threads",
        "n_threads_batch",
        "n_batch",
        "n_ubatch",
        "n_gpu_layers",
        "devices",
        "flash_attention",
        "cache_type_k",
        "cache_type_v",
        "n_experts_per_token",
        "chat_template",
    ]
    n_cpu_moe = values.pop("n_cpu_moe")
    # Of the two, what the command line says outweighs a variable or the config file.
    if values.pop("cpu_moe") and (n_cpu_moe is None or from_command_line("cpu_moe")):
        if n_cpu_moe is not None and from_command_line("n_cpu_moe"):
            raise UsageError("--cpu-moe and --n-cpu-moe are given", remedy="use one of them")
        n_cpu_moe = ALL_LAYERS
    return ModelOptions(
        path=path,
        # As in llama.cpp, 0 is the model's own.
        n_context=values.pop("n_context") or None,
        n_cpu_moe=n_cpu_moe,
        tensor_overrides=tuple(pair for pairs in values.pop("tensor_overrides") for pair in pairs),
        offload_cache=not values.pop("keep_cache"),
        **{name: values.pop(name) for name in names},
    )


def _model_file(word: str, others: Iterable[str]) -> Path:
    """The file that `word` names: a path, or a known model's name. FileError or UsageError if neither."""
    from dsmoe_local.model.discovery import find_known, unknown_model

    path = Path(os.path.expanduser(word))
    if os.path.exists(path) and not path.is_dir():
        return path
    folder = models_folder()
    known = find_known(word, folder)
    if known:
        used, *hidden = (model.path for model in known)
        if hidden:
            name = safe_line(known[0].name, 60)
            paths = safe_line(", ".join(map(str, hidden)))
            click.echo(
                f"note: {len(known)} models are called {name}: using {safe_line(str(used))}; a path names"
                f" another: {paths}",
                err=True,
            )
        return used
    if os.path.isdir(path):
        raise FileError("a folder is no model", where=path, remedy=_use_of_folder(path))
    raise unknown_model(word, folder, others)


def _use_of_folder(folder: Path) -> str:
    inside = sorted(folder.glob("*.gguf"))
    if inside:
        return f"name a file in it, such as {inside[0]}"
    if (folder / "config.json").exists():
        return f"make a model of it: dsmoe-convert {folder}"
    return "there is no GGUF file in it"
