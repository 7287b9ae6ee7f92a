"""`dsmoe demo`: makes the demo model, describes it and starts a chat. dsmoe_convert.demo builds it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsmoe_local.base.paths import demo_folder
from dsmoe_local.base.sizes import format_size
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.commands import load_command
from dsmoe_local.cli.options import FLAG, NUMBER, option, path_value
from dsmoe_local.cli.output import console, facts
from dsmoe_local.cli.progress import run_with_progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dsmoe_convert.demo.build import Built

QUESTION = "What is gravity?"
"""Asked if there is no terminal to chat in."""

CHAT_TYPE = "q4"


@define_command(
    "demo",
    ("dsmoe demo --chat", "Make the model and chat with it."),
    ("dsmoe demo --out demo", "Put the files into ./demo."),
)
@option("--out", "out", "Folder for the files.", path_value("DIR"), shown="the cache")
@option("--active-experts", "n_active", "Routed experts per token, of 14.", NUMBER, default=12)
@option("--chat", "chat", "Chat with the model; without a terminal, ask it one question.", FLAG)
@option("--force", "force", "Make the files again even if they are up to date.", FLAG)
def command(out: Path | None, n_active: int, chat: bool, force: bool) -> None:
    """Make a small DeepSeekMoE with real weights, offline.

    The FFNs of SmolLM2-135M are cut into experts. DIR gets a Hugging Face checkpoint and two conversions of
    it, demo-q8.gguf and demo-q4.gguf. Files that are up to date are kept. Commands that are not given a model
    use the demo in the cache.
    """
    from dsmoe_convert.demo.build import BuildOptions, build_demo

    built = run_with_progress(
        lambda listen, stop: build_demo(out or demo_folder(), BuildOptions(n_active, force, listen, stop))
    )
    # With --chat, stdout is for the answer.
    if built.is_new or not chat:
        _show(built, console(stderr=chat, soft_wrap=True))
    if chat:
        _chat(built.files[CHAT_TYPE])


def _chat(model: Path) -> None:
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    once = [] if on_terminal else ["--temp", "0", "-n", "120", "-p", QUESTION]
    load_command("chat").main([str(model), *once], prog_name="dsmoe chat", standalone_mode=False)


def _show(built: Built, out: Console) -> None:
    """Print what was made, its quality, and commands to try next."""
    from rich.text import Text

    done = "made" if built.is_new else "already made"
    out.print(Text.assemble(("A DeepSeekMoE from SmolLM2-135M-Instruct", "bold"), f", {done}"))
    out.print(_facts(built))
    quality = _quality_table()
    if quality is not None:
        out.print(quality)
    model = built.files[CHAT_TYPE]
    # Commands find the demo in the cache without its path.
    argument = "" if built.folder == demo_folder() else f" {model}"
    # In an environment that is not activated, the shell does not find the bare name.
    program = "dsmoe" if shutil.which("dsmoe") else str(Path(sys.executable).with_name("dsmoe"))
    out.print(
        Text.assemble(
            ("next  ", "cyan"),
            f"{program} chat{argument}\n",
            f"      {program} inspect {model}\n",
            f"      {program} convert {built.folder} --type Q4_K_M",
        )
    )


def _facts(built: Built) -> Table:
    from dsmoe_convert.demo import calibration

    experts = (
        f"{calibration.N_ROUTED_EXPERTS} routed, {built.n_active} of them active per token,"
        f" and {calibration.N_SHARED_EXPERTS} shared, of {calibration.EXPERT_SIZE} neurons each;"
        f" layer 0 stays dense"
    )
    files = [(kind, f"{path}  {format_size(path.stat().st_size)}") for kind, path in built.files.items()]
    return facts(
        [
            ("experts", experts),
            ("checkpoint", f"{built.folder}  (Hugging Face layout, float32)"),
            *files,
        ]
    )


def _quality_table() -> Table | None:
    """Return the packaged measurement, made once on a developer's machine; None if it is missing."""
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
