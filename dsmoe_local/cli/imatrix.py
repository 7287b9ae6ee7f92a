"""`dsmoe imatrix`: what each weight counts, collected from a text, merged, shown. `evaluate` collects."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.configuration import configurable, from_command_line, keys_of
from dsmoe_local.cli.model_options import ModelName, find_model, load_engine, model_option, model_options

if TYPE_CHECKING:
    from rich.table import Table

    from dsmoe_local.evaluate.importance import Collected
    from dsmoe_local.evaluate.importance_coverage import Coverage
    from dsmoe_quantize.imatrix import Imatrix

_N_CONTEXT = 512
_N_COLDEST = 8
_N_OF_LAYER = 3
_MODES = ("--merge", "--show")
_TAKEN_BY_SHOW = frozenset({"files", "show", "as_json"})
_TAKEN_BY_MERGE = frozenset({"files", "merge", "as_json", "out", "force"})


@click.command(name="imatrix")
@click.argument("files", nargs=-1, metavar="[MODEL] | FILE...", type=ModelName())
@model_option
@click.option(
    "--text",
    "source",
    type=click.Path(allow_dash=True),
    metavar="FILE|-",
    help="The text to read [a built-in one: for a first try].",
)
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What to write [<model>.imatrix.gguf in the current folder].",
)
@click.option("--merge", is_flag=True, help="Add up FILEs that were collected before.")
@click.option("--show", is_flag=True, help="Show what FILE covers; nothing is written.")
@click.option(
    "--chunks", "n_windows", type=click.IntRange(1), metavar="N", help="Read only the first N windows [all]."
)
@click.option(
    "--save-every", type=click.IntRange(1), metavar="N", help="Keep what is done every N windows [10]."
)
@click.option("--process-output", "with_output", is_flag=True, help="Also collect for the output matrix.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with all experts' counts.")
@model_options
def command(
    files: tuple[str, ...],
    named_model: str | None,
    merge: bool,
    show: bool,
    as_json: bool,
    **values: Any,  # noqa: ANN401 - the shared options
) -> None:
    """Collect an importance matrix: which input channels of each weight matrix count, per expert.

    A model reads a text, and the squares of what its matrices are multiplied with are summed up. With the
    file, dsmoe-quantize --imatrix and llama-quantize --imatrix keep those weights more exactly that count
    more. Take the unquantized model or Q8_0, and a text like what the model is to do. A run that was
    interrupted continues when the same command is given again.
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


for _option in command.params:
    if isinstance(_option, click.Option) and _option.name == "n_context":
        _option.help = f"Tokens of a window [{_N_CONTEXT}]."


def _check(files: tuple[str, ...], merge: bool, show: bool, values: dict[str, Any]) -> None:
    if merge and show:
        raise UsageError(f"{' and '.join(_MODES)} are given", remedy="use one of them")
    if merge and (len(files) < 2 or values["out"] is None):
        raise UsageError(
            "--merge takes two files or more, and -o", remedy="dsmoe imatrix --merge A B -o C.imatrix.gguf"
        )
    if show and len(files) != 1:
        raise UsageError("--show takes one file")
    if not merge and not show and len(files) > 1:
        raise UsageError("several files are named", remedy="name one model, or use --merge")


def _refuse_others(mode: str, taken: Collection[str]) -> None:
    """UsageError for an option that would have no effect. What a variable or the config file gives is meant
    for other runs.
    """
    for option in configurable(click.get_current_context().command):
        name = str(option.name)
        if name not in taken and from_command_line(name):
            raise UsageError(f"--{keys_of(option)[0]} does not go with {mode}", remedy="leave it out")


class _Result:
    """What to tell: of a matrix, where it is, and of the run that has collected it, if one has."""

    def __init__(self, imatrix: Imatrix, path: Path, collected: Collected | None = None) -> None:
        from dsmoe_local.evaluate.importance_coverage import coverage_of

        self.imatrix = imatrix
        self.path = path
        self.collected = collected
        self.coverage: Coverage = coverage_of(imatrix)
        self.built_in = False

    def as_json(self) -> dict[str, Any]:
        """docs/imatrix.md says what the fields are."""
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
    from dsmoe_local.cli.render import run_with_progress
    from dsmoe_local.evaluate.importance import ACTIVATIONS, SAVE_EVERY, collect, importance_file
    from dsmoe_local.evaluate.measure import options_for
    from dsmoe_local.evaluate.text import read_text
    from dsmoe_local.evaluate.windows import MIN_CONTEXT, cut_windows
    from dsmoe_local.model.discovery import IMATRIX_ENDING

    n_context = values["n_context"] or _N_CONTEXT
    if n_context < MIN_CONTEXT:
        raise UsageError(
            f"-c {n_context} is out of range", remedy=f"windows have {MIN_CONTEXT} tokens or more"
        )
    source, n_windows, with_output = (values.pop(name) for name in ("source", "n_windows", "with_output"))
    save_every, force = values.pop("save_every") or SAVE_EVERY, values.pop("force")
    out = values.pop("out") or Path(f"{path.stem}{IMATRIX_ENDING}")
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
        click.echo(json.dumps(result.as_json(), ensure_ascii=True))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    console.print(Text(safe_line(str(result.path)), style="bold"))
    console.print(_facts(result))
    if result.coverage.layers:
        console.print(_layers(result.coverage))
    if result.built_in:
        from dsmoe_local.evaluate.text import LICENCES

        console.print(Text(f"The built-in text: {LICENCES}.", style="dim"))


def _facts(result: _Result) -> Table:
    from rich.table import Table

    imatrix, coverage, collected = result.imatrix, result.coverage, result.collected
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
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
    for row in rows:
        grid.add_row(*row)
    return grid


def _experts(coverage: Coverage) -> list[tuple[str, str]]:
    from dsmoe_quantize.imatrix import FEW

    coldest = [
        f"layer {layer} expert {expert}: {count:,}" for count, layer, expert in coverage.coldest(_N_COLDEST)
    ]
    cold = f"{coverage.n_cold:,} of {coverage.n_experts:,} experts saw fewer than {FEW} tokens"
    advice = "; use a longer text" if coverage.n_cold else ""
    return [
        ("cold experts", f"{cold}, {coverage.n_unseen:,} saw none{advice}"),
        ("coldest", ", ".join(coldest)),
    ]


def _layers(coverage: Coverage) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("layer", "fewest", "median", "most", "cold"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("coldest experts, with their tokens")
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
