"""Starts child processes with a socket to them, and creates the errors for how they ended."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import dsmoe_local
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.errors import LESS_MEMORY, EngineCrashError, EngineError, WorkerLostError
from dsmoe_local.engine.workers import endpoints, lost_worker, parse_worker, unreachable_worker

_HOST = "dsmoe_local.engine.process.host"
_CRASH_LINES = 20
SPIN_COUNT = 1000
"""How often a waiting thread checks before it sleeps. `benchmarks/settings.py` compares it with others."""
_FULL = re.compile("OutOfDeviceMemory|out of memory")  # how Vulkan and CUDA end the process
_LOST = re.compile("Remote RPC server crashed|RPC handshake failed|Failed to connect to")
"""llama.cpp's messages when it ends the process because a worker is lost."""
_INTERRUPTED = "failed to decode, ret = 2"  # llama.cpp's message for a cancelled step, never a cause

_KEEP_LOG = "run again with --log-file FILE to keep its whole log"
_REMEDIES = {
    "SIGKILL": "memory may have run out: use a smaller context (-c) or model, or close other programs",
    "SIGBUS": "the model's file was truncated, or its disk cannot be read: check the file with dsmoe inspect",
    "SIGILL": "llama.cpp was built for another CPU: build it on this machine",
}


def start_process(
    module: str,
    *arguments: str,
    purpose: str,
    environment: Mapping[str, str],
    output: int = subprocess.DEVNULL,
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Run a module in a new Python process that is connected by a socket.

    The module's first argument is the descriptor of its end of the socket, followed by `arguments`. `output`
    receives stdout and stderr. Returns the process and the parent's end of the socket. Raises EngineError,
    whose text begins with `purpose`, if the process cannot be started.
    """
    parent_end, child_end = socket.socketpair()
    with child_end:
        try:
            process = subprocess.Popen(
                # -P: modules in the current folder must not be imported.
                [sys.executable, "-P", "-m", module, str(child_end.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[child_end.fileno()],
                env=environment,
                # Ctrl-C in a terminal must reach only the parent.
                start_new_session=True,
            )
        except OSError as error:
            parent_end.close()
            raise EngineError(f"{purpose} cannot be started: {error.strerror}") from error
    return process, parent_end


def spawn_engine() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the engine's process. Its log is its stdout. Return it and the parent's end of its socket.

    On Linux the kernel kills the process when the calling thread ends. Raises EngineError.
    """
    return start_process(
        _HOST,
        str(os.getpid()),
        purpose="the engine's process",
        environment=child_environment(),
        output=subprocess.PIPE,
    )


def child_environment() -> dict[str, str]:
    """Return this process's environment, with the same import path for a Python child."""
    root = str(Path(dsmoe_local.__file__).parents[1])
    # Threads wait for each other after every operation. By default, GNU OpenMP lets a thread spin for
    # milliseconds before it sleeps. If other programs use the cores, the thread it waits for gets none.
    waiting = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": str(SPIN_COUNT)}
    return {
        **waiting,
        # The debugger that ggml starts on an abort takes seconds, and its output hides the reason.
        "GGML_NO_BACKTRACE": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), root]),
    }


def set_up_child() -> None:
    """Ignore Ctrl-C, which the parent handles, and write no core dumps, which are as large as the model."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def crash_error(status: int, log: tuple[str, ...], *, loading: Path | None) -> EngineCrashError:
    """Return the error for an engine process that ended by itself. `status` is Popen's return code.

    `loading` is the model that it was loading; None if it had loaded its model.
    """
    name = _signal_name(-status) if status < 0 else ""
    when = f" while it loaded {safe_line(loading.name, 60)}" if loading else ""
    how = f"was killed by {name}" if name else f"ended with exit status {status}"
    relevant = [line for line in log if _INTERRUPTED not in line]
    is_full = any(map(_FULL.search, relevant[-_CRASH_LINES:]))
    return EngineCrashError(
        f"the engine {how}{when}",
        where=f"its log ends: {relevant[-1]}" if relevant else "",
        remedy=LESS_MEMORY if is_full else _REMEDIES.get(name, _KEEP_LOG),
        log=log[-_CRASH_LINES:],
    )


def lost_a_worker(log: tuple[str, ...]) -> bool:
    """Return whether the engine's process ended because a worker was lost, by its log."""
    return any(map(_LOST.search, log[-_CRASH_LINES:]))


def lost_worker_error(workers: tuple[str, ...], log: tuple[str, ...]) -> WorkerLostError:
    """Return the error for an engine process that lost a worker. Asks the workers which one it was."""
    return _lost_error(lost_worker([parse_worker(text) for text in workers]), log)


def no_progress_error(workers: tuple[str, ...], seconds: float, log: tuple[str, ...]) -> WorkerLostError:
    """Return the error for an engine process that made no progress for `seconds`.

    Asks the workers whether they can be reached.
    """
    parsed = [parse_worker(text) for text in workers]
    if reason := unreachable_worker(parsed):
        return _lost_error(reason, log)
    return WorkerLostError(
        f"no progress for {seconds:g} s: the worker {endpoints(parsed)} is too slow, or hangs",
        remedy="use a smaller ubatch (-ub), so that steps are shorter; if the worker hangs, restart it",
        log=log[-_CRASH_LINES:],
    )


def _lost_error(reason: str, log: tuple[str, ...]) -> WorkerLostError:
    return WorkerLostError(
        f"a worker was lost: {reason}",
        remedy="start `dsmoe worker` there again, then try again",
        log=log[-_CRASH_LINES:],
    )


def broken_error(what: str, cause: BaseException, log: tuple[str, ...], remedy: str = "") -> EngineCrashError:
    """Return the error for an engine process that had to be killed because of `cause`."""
    error = EngineCrashError(what, log=log, remedy=remedy)
    error.__cause__ = cause
    return error


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
