"""Make the pictures of the README and of docs/experts.md: `python docs/screens/make.py`.

Runs a chat with the demo model in a pseudo-terminal, types into it, and draws the screen as SVG.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from dsmoe_local.experts.picture import SVG_FORMAT

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
COLUMNS = 96
PATIENCE = 120.0  # seconds for anything to appear
QUIET = 8.0  # seconds without a change, after which a reply is over
# pyte's names of the sixteen colours, as Rich calls them.
COLOURS = {"brown": "yellow", "brightblack": "bright_black", "brightbrown": "bright_yellow"}


class Program:
    """A program on a terminal of `lines` lines that can be drawn."""

    def __init__(self, words: Sequence[str], lines: int, folder: Path) -> None:
        self._screen = pyte.Screen(COLUMNS, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, COLUMNS, 0, 0))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DSMOE_")}
        environment |= {
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "COLUMNS": str(COLUMNS),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "XDG_DATA_HOME": str(folder / "data"),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }
        environment.pop("NO_COLOR", None)
        self._child = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)

    def type(self, text: str) -> None:
        """Type `text` and Enter."""
        os.write(self._master, f"{text}\r".encode())

    def wait_for(self, pattern: str) -> None:
        """Wait until the screen shows `pattern`."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, "\n".join(self._screen.display)):
            if not self._read(deadline - time.monotonic()):
                raise SystemExit(f"{pattern!r} did not appear on\n" + "\n".join(self._screen.display))

    def settle(self) -> None:
        """Wait until nothing has changed for a while."""
        while self._read(QUIET):
            pass

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            chunk = os.read(self._master, 1 << 16)
        except OSError:  # on Linux: the program has ended
            return False
        self._stream.feed(chunk)
        return bool(chunk)

    def close(self) -> None:
        """Kill the program."""
        self._child.kill()
        self._child.wait()
        os.close(self._master)

    def draw(self, name: str, title: str) -> None:
        """Write what the screen shows to `name`."""
        lines = [self._line(row) for row in range(self._screen.lines)]
        while lines and not lines[-1].plain.strip():
            lines.pop()
        console = Console(width=COLUMNS, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        console.print(Text("\n").join(lines), overflow="crop", no_wrap=True)
        svg = console.export_svg(
            title=title, theme=SVG_EXPORT_THEME, code_format=SVG_FORMAT, unique_id=Path(name).stem
        )
        console.file.close()
        (HERE / name).write_text(svg, encoding="utf-8")
        print(HERE / name)

    def _line(self, row: int) -> Text:
        line = Text()
        cells = self._screen.buffer[row]
        for style, run in itertools.groupby((cells[column] for column in range(COLUMNS)), _style):
            line.append("".join(cell.data for cell in run), style)
        return line


def _style(cell: pyte.screens.Char) -> Style:
    return Style(
        color=_colour(cell.fg),
        bgcolor=_colour(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        reverse=cell.reverse,
    )


def _colour(name: str) -> str | None:
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return COLOURS.get(name, re.sub("^bright(?!_)", "bright_", name))


def chat(folder: Path) -> None:
    """A conversation with Markdown and code; then the experts."""
    words = ["dsmoe-chat", "-m", "demo-q4", "--temp", "0", "-n", "73", "-c", "2048"]
    program = Program(words, 34, folder)
    program.wait_for("context 0/")
    program.type("/save files")
    program.wait_for("files ")
    program.type("How do I read a file in Python? Give a short example.")
    program.wait_for("tokens/s")
    program.settle()
    program.type("/stats")
    program.wait_for("read in")
    program.draw("chat.svg", "dsmoe-chat")
    program.type("/clear")
    program.wait_for("a new conversation")
    program.type("/experts")
    program.wait_for("are observed")
    program.type("What is a mixture of experts?")
    program.wait_for(r"experts +\d+ tokens")
    program.settle()
    program.draw("experts.svg", "/experts")
    program.close()


def main() -> None:
    """Make all pictures."""
    folder = Path(tempfile.mkdtemp(prefix="dsmoe-screens-"))
    try:
        chat(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
