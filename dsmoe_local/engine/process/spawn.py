"""Starting the engine's process with a socket to it, and saying how it ended. What is said is `wire`'s."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import dsmoe_local
from dsmoe_local.engine.errors import EngineCrashError, EngineError

_HOST = "dsmoe_local.engine.process.host"
_CRASH_LINES = 20

_REMEDIES = {
    "SIGKILL": "perhaps memory ran out: try a smaller context (-c), a smaller model, or less beside it",
    "SIGBUS": "the model's file was cut short, or its disk cannot be read",
    "SIGILL": "llama.cpp was built for another CPU: build it on this machine",
}


def spawn() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A host, whose stdout and stderr are one pipe, and our end of its socket.

    On Linux it is killed when the calling *thread* ends. EngineError if it cannot be started.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                # -P: a folder that a user happens to work in must not provide modules.
                [sys.executable, "-P", "-m", _HOST, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=environment(),
                # A terminal's Ctrl-C is for the client alone.
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise EngineError(f"the engine's process cannot be started: {error.strerror}") from error
    return process, ours


def environment() -> dict[str, str]:
    """That of this process; what it can import, a process of ours can, too."""
    root = str(Path(dsmoe_local.__file__).parents[1])
    return {
        # A debugger that ggml starts on an abort takes seconds, and its output hides the reason.
        "GGML_NO_BACKTRACE": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), root]),
    }


_INTERRUPTED = "failed to decode, ret = 2"  # what llama.cpp says of a step that was broken off: no cause


def crash(status: int, log: tuple[str, ...], *, loading: bool) -> EngineCrashError:
    """The error for a process that ended by itself with that Popen status."""
    name = _signal_name(-status) if status < 0 else ""
    when = " while it loaded the model" if loading else ""
    how = f"was killed by {name}" if name else f"ended with exit status {status}"
    usual = "--log-file FILE keeps its whole log"
    telling = [line for line in log if _INTERRUPTED not in line]
    return EngineCrashError(
        f"the engine {how}{when}",
        where=f"its log ends: {telling[-1]}" if telling else "",
        remedy=_REMEDIES.get(name, usual),
        log=log[-_CRASH_LINES:],
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
