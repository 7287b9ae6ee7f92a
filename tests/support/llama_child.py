"""llama.cpp in a child process that loads and runs one model file after another, and may crash.

Run as a module, this file is that child: paths on stdin, a line on stdout for each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

_TEXTS = ("", "t0 t1", "hello\n\n w\xf6rld <s>", "\u4eba \U0001f680")


class LlamaChild:
    """A context manager. After a crash, the next `survives` starts a new child."""

    def __init__(self) -> None:
        self._child = self._spawn()

    def _spawn(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "support.llama_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # Writing a backtrace with a debugger takes seconds.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GGML_NO_BACKTRACE": "1"},
        )

    def outcome(self, path: Path) -> str:
        """Return what llama.cpp makes of `path`: "run", "refused" or "died"."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{path}\n")
        self._child.stdin.flush()
        if line := self._child.stdout.readline():
            return line.strip()
        self._end()
        self._child = self._spawn()
        return "died"

    def survives(self, path: Path) -> bool:
        """Return whether llama.cpp survives loading and running `path`, or refusing it."""
        return self.outcome(path) != "died"

    def _end(self) -> None:
        self._child.kill()
        self._child.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()


def _exercise(path: Path) -> str:
    """Tokenize some texts as the engine does, without BOS and EOS, and decode a few tokens."""
    from support import llama_oracle

    try:
        with llama_oracle.vocabulary(path) as vocabulary:
            for text in _TEXTS:
                for parse_special in (False, True):
                    vocabulary.encode(text, parse_special=parse_special)
        llama_oracle.logits(path, [0, 1, 2], n_context=64)
    except AssertionError:
        return "refused"
    return "run"


def _main() -> None:
    for line in sys.stdin:
        print(_exercise(Path(line.rstrip("\n"))), flush=True)


if __name__ == "__main__":
    _main()
