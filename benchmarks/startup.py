"""The waits of a chat with the demo model: for its first prompt, and for a key to appear on the screen.

    python -m benchmarks.startup

`dsmoe demo` makes the model. Keys are pressed during a reply. Prints a table, then one JSON line.
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
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.support import arguments
from benchmarks.support.tables import show

PATIENCE = 120.0  # seconds


@contextmanager
def chat(*options: str) -> Iterator[int]:
    """Run `dsmoe-chat` without history on a pseudo-terminal. Yields the descriptor of the terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    program = Path(sys.executable).with_name("dsmoe-chat")
    child = subprocess.Popen(
        [program, "--no-history", *options],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield master
    finally:
        child.kill()
        child.wait()
        os.close(master)


def seconds_until(terminal: int, text: str) -> float:
    """Wait until `text` is written. Return the seconds."""
    started = time.perf_counter()
    seen = b""
    while text.encode() not in seen:
        ready, _, _ = select.select([terminal], [], [], PATIENCE)
        if not ready:
            raise SystemExit(f"{text!r} did not appear in {seen!r}")
        seen += os.read(terminal, 1 << 16)
    return time.perf_counter() - started


def seconds_to_prompt() -> float:
    """Return the seconds from the command to the first prompt."""
    with chat() as terminal:
        return seconds_until(terminal, "context 0/")


def seconds_of_keys(n_keys: int) -> list[float]:
    """Return the seconds from each key to its character, during a reply."""
    with chat("--temp", "0", "-n", "2000") as terminal:
        seconds_until(terminal, "context 0/")
        os.write(terminal, b"Tell me a long story about a king.\r")
        seconds_until(terminal, "king.")
        seconds_until(terminal, "\x1b[?2026l")
        times = []
        for number in range(n_keys):
            # Letters that neither the reply nor the interface has.
            letter = chr(ord("\N{CYRILLIC SMALL LETTER A}") + number % 30)
            os.write(terminal, letter.encode())
            times.append(seconds_until(terminal, letter))
        return times


def main() -> None:
    """Measure and print."""
    given = arguments.parse(__doc__, starts=5, keys=40)
    prompts = [seconds_to_prompt() for _ in range(given.starts)]
    keys = seconds_of_keys(given.keys)
    rows = {
        "from `dsmoe-chat` to its first prompt": statistics.median(prompts),
        f"from a key to its character: median of {given.keys}": statistics.median(keys),
        f"the same, the worst of {given.keys}": max(keys),
    }
    show("Waits", ("", "seconds"), "lr", [(name, f"{seconds:.3f}") for name, seconds in rows.items()])
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
