"""`dsmoe experts`: the experts that a text uses. dsmoe_local.experts reads, counts and draws."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import complete_model, find_model, model_option, models_folder
from dsmoe_local.cli.model_options import load_engine, model_options, within_training
from dsmoe_local.cli.option_sources import from_command_line
from dsmoe_local.cli.options import FILE, json_option, option
from dsmoe_local.cli.output import console, print_json
from dsmoe_local.cli.progress import run_with_progress

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import RenderableType

    from dsmoe_local.base.progress import Listener
    from dsmoe_local.engine.interface import TextEngine
    from dsmoe_local.experts.reading import Reading

_N_DIFFERENCES = 12
_MOST_TEXTS = 2


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return models for the first argument, files for the others."""
    if not context.params.get(str(parameter.name)) and context.params.get("named_model") is None:
        return complete_model(context, parameter, incomplete)
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


@define_command(
    "experts",
    ("dsmoe experts model.gguf a.txt", "Show the experts of a text."),
    ("dsmoe experts model.gguf a.txt b.txt", "Compare two texts."),
    ("git log | dsmoe experts -m model.gguf -", "Read stdin."),
)
@click.argument(
    "files", nargs=-1, required=True, metavar="[MODEL] FILE.txt|- [FILE.txt]", shell_complete=_complete
)
@model_option
@json_option()
@option("--svg", "svg", "Also write the picture to a file.", FILE)
@model_options
def command(
    files: tuple[str, ...],
    named_model: str | None,
    as_json: bool,
    svg: Path | None,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Show which routed experts a text uses, layer by layer.

    MODEL is a GGUF file, or a name that `dsmoe models` lists; - stands for stdin. A text longer than the
    context is read in parts. For two texts, the experts that differ most are listed as well.
    """
    model, names = _model_and_texts(files, named_model is not None and from_command_line("named_model"))
    path = _find(model, named_model)
    if svg is not None and svg.suffix.lower() != ".svg":
        raise UsageError("--svg takes a name that ends in .svg", where=safe_line(str(svg)))
    from dsmoe_local.engine.types import PROMPTS_ONLY
    from dsmoe_local.evaluate.text import read_text
    from dsmoe_local.experts.cost import own_number
    from dsmoe_local.experts.reading import OBSERVERS

    # Before stdin is read, which may wait for the user.
    if not own_number(path):
        raise UsageError(
            "the model is dense: it has no routed experts",
            where=safe_line(str(path)),
            remedy="name a mixture of experts, such as the demo model: dsmoe demo makes it",
        )
    contents = [read_text(name).content for name in names]
    texts = dict(zip(_titles(names), contents, strict=True))
    stop = threading.Event()
    with load_engine(
        path,
        values,
        lambda options: replace(within_training(options), prompt_ratio=PROMPTS_ONLY, observers=OBSERVERS),
        stop,
    ) as engine:
        readings = run_with_progress(lambda listen, stop: _read(engine, texts, listen, stop), stop)
        name = engine.info.name
    if svg is not None:
        from dsmoe_local.experts.picture import write_picture

        write_picture(svg, name, {title: reading.activity for title, reading in readings.items()})
    if as_json:
        print_json(_as_json(name, readings))
        return
    _print(name, readings)


def _model_and_texts(files: tuple[str, ...], is_model_named: bool) -> tuple[str | None, tuple[str, ...]]:
    """Return the model, if the arguments name one, and the texts."""
    first, *others = files
    # The first argument is a model if no such file exists, or if there are three arguments.
    may_be_name = not is_model_named and first != "-" and others
    is_model = _is_gguf(first) or (may_be_name and (len(others) == _MOST_TEXTS or not os.path.exists(first)))
    model, texts = (first, tuple(others)) if is_model else (None, files)
    if not texts or (len(texts) == 1 and _is_known(texts[0])):
        raise UsageError("no text is named", remedy=f"dsmoe experts {first} FILE.txt, or - for stdin")
    if len(texts) > _MOST_TEXTS:
        raise UsageError(f"{len(texts)} texts are given", remedy="give one or two")
    if texts.count("-") > 1:
        raise UsageError("stdin is given twice", remedy="give - once")
    return model, texts


def _is_known(word: str) -> bool:
    """Return True for the name of a model that is not also a file."""
    from dsmoe_local.model.discovery import known_models

    named = {model.name.casefold() for model in known_models(models_folder()[0])}
    return not os.path.exists(word) and word.casefold() in named


def _is_gguf(word: str) -> bool:
    if word.lower().endswith(".gguf"):
        return True
    try:
        with open(word, "rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


def _find(model: str | None, named_model: str | None) -> Path:
    try:
        return find_model(model, named_model)
    except UsageError as error:
        if model is None or os.sep in model or error.where:
            raise
        # The word may be meant as a text.
        raise UsageError(error.what, where="there is no such text either", remedy=error.remedy) from error


def _titles(names: tuple[str, ...]) -> list[str]:
    """Return the names of the texts; equal names get numbers."""
    shown = ["stdin" if name == "-" else safe_line(Path(name).name, 60) for name in names]
    return [
        f"{title} ({number})" if shown.count(title) > 1 else title for number, title in enumerate(shown, 1)
    ]


def _read(
    engine: TextEngine, texts: Mapping[str, str], listen: Listener, stop: threading.Event
) -> dict[str, Reading]:
    from dsmoe_local.evaluate.windows import bos_token, encode_text
    from dsmoe_local.experts.reading import read_tokens

    bos = bos_token(engine)
    ids = {title: encode_text(engine, text) for title, text in texts.items()}
    return {
        title: read_tokens(engine, each if bos is None else each[1:], bos, title, listen, stop)
        for title, each in ids.items()
    }


def _as_json(model: str, readings: Mapping[str, Reading]) -> dict[str, Any]:
    from dsmoe_local.experts.activity import differences, overlap
    from dsmoe_local.experts.picture import activity_json

    found: dict[str, Any] = {
        "model": model,
        "texts": [
            {
                "name": title,
                "text_tokens": reading.n_tokens,
                "windows": reading.n_windows,
                "perplexity": reading.perplexity,
                **activity_json(reading.activity),
            }
            for title, reading in readings.items()
        ],
    }
    if len(readings) == 2:
        first, second = (reading.activity for reading in readings.values())
        found["overlap"] = [overlap(*pair) for pair in zip(first.layers, second.layers, strict=True)]
        found["differences"] = [
            {"layer": each.layer, "expert": each.expert, "shares": [each.first, each.second]}
            for each in differences(first, second, _N_DIFFERENCES)
        ]
    return found


def _print(model: str, readings: Mapping[str, Reading]) -> None:
    out = console()
    for part in _parts(model, readings, out.width):
        out.print(part)


def _parts(model: str, readings: Mapping[str, Reading], width: int) -> Iterator[RenderableType]:
    from rich.text import Text

    from dsmoe_local.experts.activity import differences, mean_overlap
    from dsmoe_local.experts.panel import panels
    from dsmoe_local.experts.tables import difference_table, layer_table

    yield Text(safe_line(model, 80), style="bold")
    for title, reading in readings.items():
        yield Text(f"{title}: {_about(reading)}", style="dim")
    yield Text("")
    yield panels({title: reading.activity for title, reading in readings.items()}, width)
    for number, (title, reading) in enumerate(readings.items(), 1):
        if len(readings) > 1:
            yield Text(title, style="bold")
        yield layer_table(reading.activity, width, explained=number == len(readings))
    if len(readings) == 2:
        first, second = (reading.activity for reading in readings.values())
        same = mean_overlap(first, second)
        yield Text(
            f"{same:.0%} of the experts' load is the same in both texts; they differ most in:", style="bold"
        )
        titles = tuple(readings)
        yield difference_table(differences(first, second, _N_DIFFERENCES), (titles[0], titles[1]), width)


def _about(reading: Reading) -> str:
    parts = [f"{reading.n_tokens:,} tokens"]
    if reading.n_windows > 1:
        parts.append(f"read in {reading.n_windows} parts")
    if reading.perplexity is not None:
        parts.append(f"perplexity {reading.perplexity:.2f}")
    return ", ".join(parts)
