"""Random keys, resizes and signals for the chat, and checks of its screen and its database.

`play` runs one chat on a pseudo-terminal. The chat logs what it prints, draws and saves, see
support.watched_chat. The screen must equal the logged text and frames drawn on a new screen, the database the
logged turns.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyte

from dsmoe_local.chat.store.sessions import SessionStore
from support.screens import RigidScreen, ScreenTerminal
from support.terminal import ENTER, editor_script

_SECONDS = 60.0
_WORDS = (
    "hello", "a", "word", "word,", " ", "  ", "专家混合模型", "한국어", "ไทยำ", "e\u0301a\u0308", "\u0301",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f44d\U0001f3fd", "\u26a0\ufe0f",
    "\U0001f1e9\U0001f1ea", "1\ufe0f\u20e3", "\u05e9\u05dc\u05d5\u05dd",
    "\u0645\u0631\u062d\u0628\u0627\u200f", "\u202e", "\u200b", "\u0915\u094d\u0937\u093f", "# ",
    "**bold**", "`code`", "```py", "- item", "| a | b |", "|--|--|", "> quote", "1. one", "$x$", "@a.txt",
    "\\@a.txt", "@~nobody/", "@./x", '"""', "\t", "x" * 90, "\u4e13" * 50, "[l](u)", "\xad", "\u2028",
    "/", "#", "!",
)  # fmt: skip
_KEYS = (
    "\x01", "\x02", "\x05", "\x06", "\x08", "\x0b", "\x0c", "\x0e", "\x0f", "\x10", "\x11",
    "\x12", "\x13", "\x14", "\x15", "\x16", "\x17", "\x18", "\x19", "\x1a", "\x1c", "\x1d", "\x1e",
    "\x1f", "\x00", "\x1b", "\x7f", "\x1b[A", "\x1b[B", "\x1b[C", "\x1b[D", "\x1b[H", "\x1b[F", "\x1b[3~",
    "\x1b[5~", "\x1b[6~", "\x1b[1;5C", "\x1b[1;2D", "\x1b[Z", "\x1bOP", "\x1b[24~", "\x1bb", "\x1bf",
    "\x1bd", "\x1b.", "\x1b<", "\x1b>", "\x1bx", "\x1b\r", "\n", "\t", "\t\t", "\x1b[<0;3;4M", "\x1b[I",
    "\x1b[O", "\x1b[1;1R", "\x1b[200~\x1b[201~", "\x1b[999~", "\x1b]11;rgb:0/0/0\x07", "\x03", "\x18\x15",
    "\x07", "\x18\x05", "\x1b1", "\x1bt",
)  # fmt: skip
_COMMANDS = (
    "/help", "/undo", "/undo 2", "/regen", "/continue", "/edit other", "/edit", "/editor", "/clear",
    "/sessions", "/load 1", "/load 2", "/save one", "/fork", "/fork two", "/rename three",
    "/search hello", "/context", "/tokens ab", "/stats", "/set", "/set on_full compact",
    "/set on_full shift", "/set max_tokens 20", "/set max_tokens none", "/system Be brief.",
    "/system off", "/export a.md", "/export a.html", "/copy", "/read a.txt x", "/read nowhere",
    "/show prompt", "/show info", "/hlep", "/continue x", "/usr/bin", "/delete nobody", "/editor x",
)  # fmt: skip
_SIZES = ((80, 24), (40, 12), (20, 6), (120, 40), (61, 24), (80, 10), (33, 30), (12, 4))


@dataclass
class Played:
    """How many keys were sent, and how often each action was done."""

    keys: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: Played) -> None:
        """Add the counts of another chat."""
        self.keys += other.keys
        self.counts += other.counts


class Paper:
    """The rows that the chat has printed, below the rows of `base`."""

    def __init__(self, columns: int, base: Sequence[str] = ()) -> None:
        self.columns = columns
        self.base = list(base)
        self._screen = RigidScreen(columns, 200, history=100_000)
        self._stream = pyte.Stream(self._screen)

    def print(self, text: str) -> None:
        """Print lines, each with its newline."""
        self._stream.feed(text.replace("\n", "\r\n"))

    def rows(self) -> list[str]:
        """Return the printed rows, without `base`."""
        rows = [
            *self._screen.history.top,
            *(self._screen.buffer[row] for row in range(self._screen.cursor.y)),
        ]
        return [row_text(row, self.columns) for row in rows]


def row_text(row: Mapping[int, Any], columns: int) -> str:
    """Return a row of a screen without trailing spaces."""
    return "".join(row[column].data for column in range(columns)).rstrip()


def frame_rows(lines: Sequence[str], columns: int) -> list[str]:
    """Return the rows of a frame drawn on a new screen."""
    screen = RigidScreen(columns, len(lines))
    pyte.Stream(screen).feed("\x1b[?7l" + "\r\n".join(lines))
    return [row_text(screen.buffer[row], columns) for row in range(len(lines))]


class WatchedTerminal(ScreenTerminal):
    """A chat that logs what it does, and compares its screen with the log."""

    def __init__(self, folder: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._path = folder / "log"
        self._path.unlink(missing_ok=True)
        self._log_place = 0
        self._paper: Paper | None = Paper(80)  # None: the rows above the frame are not known
        self._since = ""  # printed since then
        self._frame: dict[str, Any] | None = None
        self.n_entries = 0
        self.busy = False  # a message is being answered
        self.saving: list[Any] | None = None
        self.saved: dict[int, list[Any]] = {}
        self.n_saved = 0
        super().__init__(
            ["-m", "support.watched_chat", str(self._path), *arguments], environment, folder=folder
        )

    @property
    def input(self) -> str | None:
        """The input when it was last drawn; None if the keyboard focus is elsewhere."""
        return None if self._frame is None else self._frame["input"]

    def read_log(self) -> None:
        """Read the new entries of the log."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._log_place)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._log_place += len(whole)
        for line in whole.splitlines():
            self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        self.n_entries += 1
        event = entry["event"]
        if event == "take":
            self.busy = entry["begins"]
        elif event == "saving":
            self.saving = entry["turns"]
        elif event == "saved":
            self.saved[entry["session"]], self.saving = entry["turns"], None
            self.n_saved += 1
        elif event in ("clear", "reset"):
            self.forget()
        else:
            self._since += entry["above"]
            if self._paper is not None:
                self._paper.print(entry["above"])
            self._frame = entry if event == "draw" else None
            if self._frame is not None and entry["size"] != [self.screen.columns, self.screen.lines]:
                # Text printed in the meantime may be wrapped differently.
                self._paper, self._since = None, ""

    def forget(self) -> None:
        """Forget the rows above the frame."""
        self._paper, self._since, self._frame = None, "", None

    def wrong(self) -> str:
        """Return what is wrong on the screen, or an empty string."""
        self.read_log()
        frame, screen = self._frame, self.screen
        if frame is None:
            return "nothing is drawn"
        if frame["size"] != [screen.columns, screen.lines]:
            return f"drawn for {frame['size']}, not {screen.columns} x {screen.lines}"
        drawn = frame_rows(frame["lines"], screen.columns)
        top = screen.cursor.y - frame["cursor"][0]
        shown = [row_text(screen.buffer[row], screen.columns) for row in range(max(0, top), screen.lines)]
        n_hidden = max(0, -top)
        if shown[: len(drawn) - n_hidden] != drawn[n_hidden:] or any(shown[len(drawn) - n_hidden :]):
            return "the frame is not what was drawn:\n" + "\n".join(["shown", *shown, "drawn", *drawn])
        if screen.cursor.x != min(frame["cursor"][1], screen.columns - 1):
            return f"the cursor is in column {screen.cursor.x}, not {frame['cursor'][1]}"
        n_above = len(screen.history.top) + max(0, top)
        rows = [*screen.history.top, *(screen.buffer[row] for row in range(max(0, top)))]
        above = [row_text(row, screen.columns) for row in rows]
        paper = self._paper
        if paper is None:
            paper = Paper(screen.columns)
            paper.print(self._since)
            printed = paper.rows()
            if printed and above[-len(printed) :] != printed:
                return "not what was printed:\n" + "\n".join(
                    ["shown", *above[-len(printed) :], "printed", *printed]
                )
            self._paper = Paper(screen.columns, above[: n_above - len(printed)])
            self._paper.print(self._since)
            return ""
        printed = [*paper.base, *paper.rows()]
        if above != printed:
            place = next(
                (at for at, pair in enumerate(zip(above, printed, strict=False)) if pair[0] != pair[1]), -3
            )
            return "\n".join(
                [
                    f"not what was printed, at {place} of {len(above)}, {len(printed)}:",
                    *("shown", *above[max(0, place - 3) :][:20]),
                    *("printed", *printed[max(0, place - 3) :][:20]),
                ]
            )
        return ""

    def settle(self) -> None:
        """Wait until nothing is wrong on the screen; AssertionError after a minute."""
        deadline = time.monotonic() + _SECONDS
        while True:
            while self._read(0.03):
                pass
            wrong = self.wrong()
            if not wrong:
                return
            if self._child.poll() is not None:
                raise EOFError
            if time.monotonic() > deadline:
                raise AssertionError(wrong)

    def resize_checked(self, columns: int, lines: int) -> None:
        """Resize once nothing is wrong. The resize must lose nothing of the conversation."""
        self.settle()
        n_before, frame, screen = self.n_entries, self._frame, self.screen
        assert frame is not None
        super().resize(columns, lines)
        self.read_log()
        top = screen.cursor.y - frame["cursor"][0]
        rows = [*screen.history.top, *(screen.buffer[row] for row in range(max(0, top)))]
        above = [row_text(row, columns) for row in rows]
        if self.n_entries == n_before and top >= 0:
            self._paper, self._since = Paper(columns, above), ""
        else:
            self.forget()

    def resize_anytime(self, columns: int, lines: int) -> None:
        """Resize at once. A program is not told about the same size."""
        if (columns, lines) != (self.screen.columns, self.screen.lines):
            super().resize(columns, lines)
            self.forget()


class Player:
    """Plays one chat."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.played = Played()
        self.done: list[str] = []
        self.folder = folder
        self.data = folder / "data"
        folder.joinpath("a.txt").write_text("text of a\n")
        editor = editor_script(folder, 'echo "written $$" >> "$1"')
        self._environment = {"XDG_DATA_HOME": str(self.data), "VISUAL": editor, "PATH": os.environ["PATH"]}
        self.terminal = self._start()
        self._n_tokens = 0

    def _start(self) -> WatchedTerminal:
        arguments = [word for word in ("latest", "400") if self.random.random() < 0.5]
        terminal = WatchedTerminal(self.folder, arguments, self._environment)
        self.played.counts["chats"] += 1
        return terminal

    def keys(self, text: str) -> None:
        """Send keys."""
        self.played.keys += len(text)
        self.done.append(text)
        self.terminal.send(text)

    def run(self, n_keys: int) -> Played:
        """Do random actions until `n_keys` keys have been sent."""
        actions: Sequence[tuple[int, Callable[[], None]]] = (
            (30, self._word), (25, self._key), (12, self._enter), (8, self._command), (4, self._paste),
            (4, self._typed_whole), (3, self._resize), (2, self._resize_anytime), (2, self._signal),
            (6, self._check), (1, self._leave), (1, self._kill), (1, self._bytes), (3, self._interrupt),
            (1, self._delete),
        )  # fmt: skip
        weights, functions = zip(*actions, strict=True)
        try:
            self.terminal.settle()
            while self.played.keys < n_keys:
                act = self.random.choices(functions, weights)[0]
                self.played.counts[act.__name__.strip("_")] += 1
                try:
                    act()
                except (EOFError, OSError):
                    self._ended()
            self._kill()
        finally:
            self.terminal.__exit__(None, None, None)
        return self.played

    def _word(self) -> None:
        self.keys(self.random.choice(_WORDS))

    def _key(self) -> None:
        self.keys(self.random.choice(_KEYS))

    def _enter(self) -> None:
        self.keys(ENTER)

    def _interrupt(self) -> None:
        self.keys("\x03")

    def _delete(self) -> None:
        """Ctrl-D, unless the input is empty, where it would leave."""
        self.keys("x\x02")
        self.terminal.settle()
        if self.terminal.input:
            self.keys("\x04")

    def _bytes(self) -> None:
        self.done.append("bytes")
        os.write(self.terminal.master, self.random.randbytes(4).replace(b"\x04", b"").replace(b"\x1b", b""))

    def _command(self) -> None:
        self.keys("\x03" if self.random.random() < 0.8 else "")
        self.keys(self.random.choice(_COMMANDS) + ENTER)

    def _paste(self) -> None:
        words = self.random.choices((*_WORDS, "\r", "\r\n", "\n", "\x00", "\x07", "\x1b[2J", "\x9b3m"), k=30)
        self.keys(f"\x1b[200~{''.join(words)}\x1b[201~")

    def _check(self) -> None:
        self.terminal.settle()

    def _resize(self) -> None:
        size = self.random.choice(_SIZES)
        self.done.append(f"resize {size}")
        self.terminal.resize_checked(*size)
        if self.random.random() < 0.5:
            self.terminal.settle()

    def _resize_anytime(self) -> None:
        size = self.random.choice(_SIZES)
        self.done.append(f"resize anytime {size}")
        self.terminal.resize_anytime(*size)

    def _typed_whole(self) -> None:
        """Check that text typed during resizes and replies is complete."""
        self.keys("\x03")
        # While an editor is open Ctrl-C is a signal, which may arrive after the keys that follow it.
        self._n_tokens += 1
        if not any(self._appears(f"ready{self._n_tokens}.{attempt}", seconds=5) for attempt in range(3)):
            return  # the keyboard focus is elsewhere
        token = f"token{self._n_tokens}of{self.random.random()}"
        for letter in token[:-1]:
            self.keys(letter)
            if self.random.random() < 0.1:
                self._resize_anytime()
        if not self._appears(token[-1], token, _SECONDS):
            raise AssertionError(f"typed {token!r}, there is {self.terminal.input!r}")

    def _appears(self, typed: str, wanted: str = "", seconds: float = 0) -> bool:
        """Type `typed`; return whether it, or `wanted`, then appears in the input."""
        self.keys(typed)
        deadline = time.monotonic() + seconds
        while (wanted or typed) not in (self.terminal.input or ""):
            self.terminal.settle()
            if time.monotonic() > deadline:
                return False
        return True

    def _signal(self) -> None:
        number = self.random.choice((signal.SIGWINCH, signal.SIGINT, signal.SIGCONT, signal.SIGSTOP))
        self.done.append(number.name)
        os.kill(self.terminal.pid, number)
        if number == signal.SIGSTOP:
            self.keys(self.random.choice(_WORDS))
            self._resize_anytime()
            os.kill(self.terminal.pid, signal.SIGCONT)

    def _leave(self) -> None:
        self.terminal.settle()
        self.keys("\x03")
        self.terminal.settle()
        self.done.append("leave")
        how = self.random.choice(("\x04", "SIGTERM", "SIGHUP"))
        if how == "\x04":
            self.keys(how)
            while self.terminal._read(2.0):
                pass
            if self.terminal._child.poll() is not None:
                self._ended()
            return
        number = signal.Signals[how]
        os.kill(self.terminal.pid, number)
        if self.terminal.ending() != 1:
            raise AssertionError(f"{how} ended it otherwise")
        self._restart()

    def _kill(self) -> None:
        self.done.append("kill")
        os.kill(self.terminal.pid, signal.SIGKILL)
        self.terminal.ending()
        self._restart()

    def _ended(self) -> None:
        """Check that the chat ended without an error."""
        status = self.terminal.ending()
        if status != 0 or "Traceback" in self.terminal.text:
            raise AssertionError(f"the chat ended with {status}:\n{self.terminal.text[-3000:]}")
        self.played.counts["left"] += 1
        self._restart()

    def _restart(self) -> None:
        self.terminal.read_log()
        self._check_turns()
        self.terminal.__exit__(None, None, None)
        self.terminal = self._start()
        self.terminal.settle()

    def _check_turns(self) -> None:
        """Check that the turns logged as saved are in the database."""
        terminal = self.terminal
        self.played.counts["saves"] += terminal.n_saved
        store = SessionStore.open(self.data / "dsmoe-local" / "sessions")
        try:
            for number, turns in terminal.saved.items():
                stored = store.find(str(number)).load("bytes")
                found = [[turn.role.value, turn.content] for turn in stored.turns]
                self.played.counts["turns"] += len(found)
                # A part of a running reply may have been saved.
                goes_on = terminal.busy and found[: len(turns) - 1] == turns[:-1]
                if found not in (turns, terminal.saving) and not goes_on:
                    raise AssertionError(f"session {number}: saved {turns}, found {found}")
        finally:
            store.close()


def play(seed: int, n_keys: int, folder: Path) -> Played:
    """Play one chat. AssertionError, with the last keys, if something is wrong."""
    player = Player(seed, folder)
    try:
        return player.run(n_keys)
    except BaseException as error:
        raise AssertionError(f"seed {seed}, {error}\nlast keys: {player.done[-60:]!r}") from error
