"""The waits a user feels: `dsmoe --help`, a file's header, the chat's first prompt, a key during a reply.

    python -m benchmarks.startup

The vocabulary is synthetic (102,400 tokens, 100,000 merges, no tensors); the `gguf` package's reader is
measured beside ours. The chat runs on the demo's model, which `dsmoe demo` makes.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import gguf
from gguf.constants import GGUFValueType

from benchmarks.support.runner import in_turn, timed
from benchmarks.support.tables import show
from dsmoe_local.base.paths import demo_folder
from dsmoe_local.model.gguf_file import Field, read_gguf
from dsmoe_local.model.gguf_writer import plan_gguf

RUNS = 11
_PATIENCE = 120.0  # seconds


class ChatTerminal:
    """`dsmoe-chat` with the demo's model on a pseudo-terminal. It keeps no history."""

    def __init__(self, *options: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        program = str(Path(sys.executable).with_name("dsmoe-chat"))
        self._child = subprocess.Popen(
            [program, "--no-history", *options],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(slave)

    def send(self, text: str) -> None:
        """Send keys."""
        os.write(self._master, text.encode())

    def seconds_until(self, text: str) -> float:
        """Wait until `text` is written, and return how long that took."""
        started = time.perf_counter()
        seen = b""
        while text.encode() not in seen:
            ready, _, _ = select.select([self._master], [], [], _PATIENCE)
            if not ready:
                raise SystemExit(f"{text!r} did not appear in {seen!r}")
            seen += os.read(self._master, 1 << 16)
        return time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._master)


def vocabulary_file(folder: Path) -> Path:
    """A GGUF file that holds nothing but a vocabulary of the 16B's size."""

    def words(count: int, form: str) -> Field:
        return Field([form.format(n) for n in range(count)], GGUFValueType.ARRAY, GGUFValueType.STRING)

    metadata = {
        "general.architecture": Field("deepseek", GGUFValueType.STRING),
        "tokenizer.ggml.tokens": words(102_400, "token{}"),
        "tokenizer.ggml.token_type": Field([1] * 102_400, GGUFValueType.ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.merges": words(100_000, "tok en{}"),
    }
    path = folder / "vocabulary.gguf"
    path.write_bytes(plan_gguf(metadata, []).header)
    return path


def seconds_to_prompt() -> float:
    """From the command to the chat's first prompt."""
    with ChatTerminal() as terminal:
        return terminal.seconds_until("context 0/")


def seconds_of_keys(n_keys: int = 40) -> list[float]:
    """From a key to its letter on the screen, while a reply runs."""
    with ChatTerminal("--temp", "0", "-n", "2000") as terminal:
        terminal.seconds_until("context 0/")
        terminal.send("Tell me a long story about a king.\r")
        terminal.seconds_until("king.")
        terminal.seconds_until("\x1b[?2026l")
        times = []
        for number in range(n_keys):
            letter = chr(ord("\N{CYRILLIC SMALL LETTER A}") + number % 30)
            terminal.send(letter)
            times.append(terminal.seconds_until(letter))
        return times


def main() -> None:
    """Print a table, then one JSON line."""
    dsmoe = str(Path(sys.executable).with_name("dsmoe"))
    with tempfile.TemporaryDirectory() as folder:
        path = vocabulary_file(Path(folder))
        fast = {
            "dsmoe --help": timed(lambda: subprocess.run([dsmoe, "--help"], check=True, capture_output=True)),
            "python -c pass": timed(
                lambda: subprocess.run([sys.executable, "-c", "pass"], check=True, capture_output=True)
            ),
            "header of 102,400 tokens, ours": timed(lambda: read_gguf(path)),
        }
        slow = {"header of 102,400 tokens, gguf package": timed(lambda: gguf.GGUFReader(path))}
        found = in_turn(fast, RUNS) | in_turn(slow, 1)
    if (demo_folder() / "demo-q4.gguf").is_file():
        keys = seconds_of_keys()
        found |= in_turn({"dsmoe-chat to its prompt, demo": lambda _: seconds_to_prompt()}, 5)
        found |= {"a key during a reply, median": keys, "a key during a reply, worst of 40": [max(keys)]}
    rows = {name: statistics.median(seconds) for name, seconds in found.items()}
    show("Waits", ("", "seconds"), "lr", [(name, f"{seconds:.3f}") for name, seconds in rows.items()])
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
