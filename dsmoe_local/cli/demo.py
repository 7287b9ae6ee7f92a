"""`dsmoe demo`: makes the demo model, says what it is, hands over to chat. The work is dsmoe_convert's."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsmoe_local.base.paths import demo_folder
from dsmoe_local.base.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dsmoe_convert.demo.build import Built

QUESTION = "What is gravity?"
"""Asked where there is no terminal to chat in."""

CHAT_TYPE = "q4"


@click.command(name="demo")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where to put it [the cache].")
@click.option(
    "--active-experts", "n_active", type=int, metavar="K", help="Routed experts per token, of 14 [12]."
)
@click.option("--chat", is_flag=True, help="Chat with it; without a terminal, answer one question.")
@click.option("--force", is_flag=True, help="Make it again even if nothing has changed.")
def command(out: Path | None, n_active: int | None, chat: bool, force: bool) -> None:
    """Make a small DeepSeekMoE with real weights, offline: SmolLM2-135M cut into experts.

    DIR then holds a Hugging Face checkpoint and what dsmoe convert makes of it, demo-q8.gguf and
    demo-q4.gguf. A second run finds them there. The commands that run a model use the one in the cache when
    none is named.
    """
    from rich.console import Console

    from dsmoe_convert.demo.build import BuildOptions, build_demo
    from dsmoe_convert.demo.calibration import N_ACTIVE
    from dsmoe_local.cli.render import run_with_progress

    n_active = N_ACTIVE if n_active is None else n_active
    built = run_with_progress(
        lambda listen, stop: build_demo(out or demo_folder(), BuildOptions(n_active, force, listen, stop))
    )
    # With --chat, stdout is the answer's.
    console = Console(stderr=chat, highlight=False, markup=False, soft_wrap=True)
    if built.is_new or not chat:
        _show(built, console)
    if chat:
        _chat(built.files[CHAT_TYPE])


def _chat(model: Path) -> None:
    from dsmoe_local.cli.main import load_command

    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    once = [] if on_terminal else ["--temp", "0", "-n", "120", "-p", QUESTION]
    load_command("chat").main([str(model), *once], prog_name="dsmoe chat", standalone_mode=False)


def _show(built: Built, console: Console) -> None:
    """What was made, how good it is, and what to type next."""
    from rich.text import Text

    done = "made" if built.is_new else "already made"
    console.print(Text.assemble(("A DeepSeekMoE from SmolLM2-135M-Instruct", "bold"), f", {done}"))
    console.print(_facts(built))
    quality = _quality_table()
    if quality is not None:
        console.print(quality)
    model = built.files[CHAT_TYPE]
    # The commands find the cached demo by themselves.
    argument = "" if built.folder == demo_folder() else f" {model}"
    # In an environment that is not activated the bare name would not be found.
    program = "dsmoe" if shutil.which("dsmoe") else str(Path(sys.executable).with_name("dsmoe"))
    console.print(
        Text.assemble(
            ("next  ", "cyan"),
            f"{program} chat{argument}\n",
            f"      {program} inspect {model}\n",
            f"      {program} convert {built.folder} --type Q4_K_M",
        )
    )


def _facts(built: Built) -> Table:
    from rich.table import Table

    from dsmoe_convert.demo import calibration

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    grid.add_row(
        "experts",
        f"{calibration.N_ROUTED_EXPERTS} routed, {built.n_active} of them active per token,"
        f" and {calibration.N_SHARED_EXPERTS} shared, of {calibration.EXPERT_SIZE} neurons each;"
        f" layer 0 stays dense",
    )
    grid.add_row("checkpoint", f"{built.folder}  (Hugging Face layout, float32)")
    for kind, path in built.files.items():
        grid.add_row(kind, f"{path}  {format_size(path.stat().st_size)}")
    return grid


def _quality_table() -> Table | None:
    """The packaged measurement: made once, on a developer's machine, by the command it names."""
    from rich.table import Table

    from dsmoe_convert.demo.calibration import QUALITY

    if not QUALITY.is_file():
        return None
    measured = json.loads(QUALITY.read_text(encoding="utf-8"))
    table = Table(
        title="Perplexity on text it was not calibrated on", title_justify="left", title_style="", box=None
    )
    table.caption = f"measured once, on another machine, by: {measured['command']}"
    table.caption_justify = "left"
    for heading in ("model", "type", "active experts", "perplexity"):
        table.add_column(heading, justify="right" if heading == "perplexity" else "left")
    for row in measured["rows"]:
        active = f"{row['active']} of {row['experts']}" if row["experts"] else "all (dense)"
        table.add_row(row["model"], row["type"], active, f"{row['perplexity']:.2f}")
    return table
