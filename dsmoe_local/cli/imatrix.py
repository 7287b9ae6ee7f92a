"""`dsmoe imatrix`: collects, merges and shows importance matrices. `evaluate.importance` collects."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import find_model, model_argument, model_option
from dsmoe_local.cli.model_options import (
    check_window,
    load_engine,
    model_options_without_context,
    window_option,
)
from dsmoe_local.cli.option_sources import from_command_line
from dsmoe_local.cli.options import COUNT, FILE, FLAG, Group, configurable, json_option, option, typed
from dsmoe_local.cli.output import built_in_text, console, facts, plain_table, print_json
from dsmoe_local.cli.progress import run_with_progress

if TYPE_CHECKING:
    from rich.table import Table

    from dsmoe_local.evaluate.importance import Collected
    from dsmoe_local.evaluate.importance_coverage import Coverage
    from dsmoe_quantize.imatrix import Imatrix

_N_COLDEST = 8
_N_OF_LAYER = 3
_TAKEN_BY_SHOW = frozenset({"files", "show", "as_json"})
_TAKEN_BY_MERGE = frozenset({"files", "merge", "as_json", "out", "force"})


@define_command(
    "imatrix",
    ("dsmoe imatrix model-bf16.gguf --text t.txt", "Write model-bf16.imatrix.gguf."),
    ("dsmoe imatrix --merge A B -o C.imatrix.gguf", "Add up two matrices."),
    ("dsmoe imatrix --show A", "Show how often each expert was used."),
)
@model_argument("files", "[MODEL] | FILE...", nargs=-1)
@model_option
@option(
    "--text",
    "source",
    "Text to read.",
    typed(click.Path(allow_dash=True), "FILE|-"),
    shown="a built-in one, for a first try",
)
@option("-o, --output", "out", "File to write.", FILE, shown="<model>.imatrix.gguf")
@option("--merge", "merge", "Add up FILEs from earlier runs.", FLAG)
@option("--show", "show", "Show what FILE covers, and write nothing.", FLAG)
@option("--chunks", "n_windows", "Read only the first N windows.", COUNT, shown="all")
@option("--force", "force", "Replace an existing output.", FLAG)
@json_option("Print one JSON object, with the counts of all experts.")
@option(
    "--save-every",
    "save_every",
    "Save the intermediate result every N windows.",
    COUNT,
    Group.ADVANCED,
    # evaluate.importance.SAVE_EVERY
    default=10,
)
@option("--process-output", "with_output", "Also collect for the output matrix.", FLAG, Group.ADVANCED)
@window_option
@model_options_without_context
def command(
    files: tuple[str, ...],
    named_model: str | None,
    merge: bool,
    show: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Collect an importance matrix for quantizing: how important each input column of each matrix is.

    The model reads a text, and the squares of the inputs of its matrices are summed, for each expert
    separately. dsmoe quantize --imatrix and llama-quantize --imatrix then encode important weights more
    precisely. Use the unquantized model or Q8_0, and a text like those the model is used for. Run the same
    command again to continue an interrupted run.
    """
    _check(files, merge, show, values)
    if merge or show:
        _refuse_others("--merge" if merge else "--show", _TAKEN_BY_MERGE if merge else _TAKEN_BY_SHOW)
    if show:
        _print(_shown(Path(files[0])), as_json)
    elif merge:
        _print(_merged([Path(file) for file in files], values["out"], values["force"]), as_json)
    else:
        _print(_collected(find_model(files[0] if files else None, named_model), values), as_json)


def _check(files: tuple[str, ...], merge: bool, show: bool, values: dict[str, Any]) -> None:
    if merge and show:
        raise UsageError("--merge and --show exclude each other", remedy="give one of them")
    if merge and (len(files) < 2 or values["out"] is None):
        raise UsageError(
            "--merge needs two files or more, and -o", remedy="dsmoe imatrix --merge A B -o C.imatrix.gguf"
        )
    if show and len(files) != 1:
        raise UsageError("--show takes one file", remedy="dsmoe imatrix --show FILE")
    if not merge and not show and len(files) > 1:
        raise UsageError(f"{len(files)} models are named", remedy="name one, or add up matrices with --merge")


def _refuse_others(mode: str, taken: Collection[str]) -> None:
    """Raise UsageError for an option on the command line that has no effect in this mode."""
    for each in configurable(click.get_current_context().command):
        name = str(each.name)
        if name not in taken and from_command_line(name):
            raise UsageError(f"--{each.keys[0]} has no effect with {mode}", remedy="leave it out")


class _Result:
    """What to print: a matrix, its path, and the run that collected it, if any."""

    def __init__(self, imatrix: Imatrix, path: Path, collected: Collected | None = None) -> None:
        from dsmoe_local.evaluate.importance_coverage import coverage_of

        self.imatrix = imatrix
        self.path = path
        self.collected = collected
        self.coverage: Coverage = coverage_of(imatrix)
        self.built_in = False

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON; docs/imatrix.md describes the fields."""
        imatrix, collected = self.imatrix, self.collected
        found = {
            "file": str(self.path),
            "texts": list(imatrix.datasets),
            "n_windows": imatrix.n_chunks,
            "n_context": imatrix.chunk_size,
            "n_tensors": len(imatrix.entries),
            "coverage": self.coverage.as_json(),
        }
        if collected is not None:
            found |= {
                "perplexity": collected.perplexity,
                "seconds": collected.seconds,
                "tokens_per_second": collected.tokens_per_second,
            }
        return found


def _shown(path: Path) -> _Result:
    from dsmoe_quantize.imatrix_file import read_imatrix

    return _Result(read_imatrix(path), path)


def _merged(paths: list[Path], out: Path, force: bool) -> _Result:
    from dsmoe_local.evaluate.importance import importance_file
    from dsmoe_quantize.imatrix import merged
    from dsmoe_quantize.imatrix_file import read_imatrix

    imatrix = merged([read_imatrix(path) for path in paths])
    with importance_file(out, force=force) as place:
        place.save(imatrix)
        place.publish()
    return _Result(imatrix, out)


def _collected(path: Path, values: dict[str, Any]) -> _Result:
    from dsmoe_local.evaluate.importance import ACTIVATIONS, collect, importance_file
    from dsmoe_local.evaluate.measure import options_for
    from dsmoe_local.evaluate.text import read_text
    from dsmoe_local.evaluate.windows import cut_windows
    from dsmoe_local.model.discovery import IMATRIX_ENDING
    from dsmoe_local.model.split_name import model_stem

    n_context = values["n_context"]
    check_window(n_context)
    source, n_windows, with_output = (values.pop(name) for name in ("source", "n_windows", "with_output"))
    save_every, force = values.pop("save_every"), values.pop("force")
    out = values.pop("out") or Path(f"{model_stem(path)}{IMATRIX_ENDING}")
    text, stop = read_text(source), threading.Event()
    with (
        importance_file(out, force=force) as place,
        load_engine(
            path, values, lambda options: options_for(options, n_context, ACTIVATIONS), stop
        ) as engine,
    ):
        windows = cut_windows(engine, text, n_context, n_windows)
        collected = run_with_progress(
            lambda listen, stop: collect(
                engine,
                windows,
                place,
                with_output=with_output,
                save_every=save_every,
                listen=listen,
                stop=stop,
            ),
            stop,
        )
    result = _Result(collected.imatrix, out, collected)
    result.built_in = source is None
    return result


def _print(result: _Result, as_json: bool) -> None:
    if as_json:
        print_json(result.as_json())
        return
    from rich.text import Text

    out = console()
    out.print(Text(safe_line(str(result.path)), style="bold"))
    out.print(_facts(result))
    if result.coverage.layers:
        out.print(_layers(result.coverage))
    if result.built_in:
        out.print(built_in_text())


def _facts(result: _Result) -> Table:
    imatrix, coverage, collected = result.imatrix, result.coverage, result.collected
    windows = f"{imatrix.n_chunks:,} windows"
    if not imatrix.is_legacy:
        windows += f" of {imatrix.chunk_size:,} tokens"
    rows = [("text", f"{safe_line(', '.join(imatrix.datasets), 200) or 'unknown'}: {windows}")]
    if collected is not None:
        rows.append(("speed", f"{collected.tokens_per_second:.4g} tokens/s"))
        rows.append(
            ("perplexity", f"{collected.perplexity:.4g} (of all tokens but the first of each window)")
        )
    rows.append(("tensors", f"{len(imatrix.entries):,}"))
    if coverage.layers:
        rows += _experts(coverage)
    return facts(rows)


def _experts(coverage: Coverage) -> list[tuple[str, str]]:
    from dsmoe_quantize.imatrix import MIN_TOKENS

    coldest = [
        f"layer {layer} expert {expert}: {count:,}" for count, layer, expert in coverage.coldest(_N_COLDEST)
    ]
    cold = f"{coverage.n_cold:,} of {coverage.n_experts:,} experts saw fewer than {MIN_TOKENS} tokens"
    advice = "; use a longer text" if coverage.n_cold else ""
    return [
        ("cold experts", f"{cold}, {coverage.n_unseen:,} saw none{advice}"),
        ("coldest", ", ".join(coldest)),
    ]


def _layers(coverage: Coverage) -> Table:
    last = "coldest experts, with their tokens"
    table = plain_table("layer", "fewest", "median", "most", "cold", last, wrap=(last,))
    for layer in coverage.layers:
        table.add_row(
            str(layer.layer),
            f"{min(layer.counts):,}",
            f"{layer.median:,.0f}",
            f"{max(layer.counts):,}",
            str(layer.n_cold),
            ", ".join(f"{expert} ({layer.counts[expert]:,})" for expert in layer.coldest[:_N_OF_LAYER]),
        )
    return table
