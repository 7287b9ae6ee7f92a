"""Run restricted child processes that read untrusted files.

A child inherits no open files, no standard error, and only those environment variables that Python needs to
find its packages. Before it opens the untrusted file, the child calls `confine`, which limits memory, CPU
time, writing and processes, and `leave_network`. macOS ignores the limit on memory and has no network
namespaces.
"""

from __future__ import annotations

import ctypes
import os
import resource
import selectors
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from dsmoe_local.base.errors import InterruptedRunError

MAX_OUTPUT = 256 << 20
"""Limit of a child's output in bytes. A checkpoint with 100,000 tensors needs about ten million."""
_POLL = 0.2
_CHUNK = 1 << 20
# Search paths without which Python may not find its packages or their libraries.
_KEPT = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# The threads of libraries count as processes, which are limited.
_SET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


class GaveUpError(Exception):
    """A child took too long or wrote too much. The text is part of a message to the user."""


def run_module(
    module: str,
    argument: str,
    *,
    seconds: float,
    input_bytes: bytes = b"",
    stop: threading.Event | None = None,
) -> tuple[int, bytes]:
    """Run `module` in a child process. Return its exit status and output. Ctrl-C does not reach the child.

    Raises GaveUpError after `seconds` or more than MAX_OUTPUT bytes, InterruptedRunError if `stop` is set,
    OSError if the child cannot be started.
    """
    environment = dict(_SET)
    for name in _KEPT:
        if found := [
            os.path.abspath(folder) for folder in os.environ.get(name, "").split(os.pathsep) if folder
        ]:
            environment[name] = os.pathsep.join(found)
    # -P: a file called torch.py in the current folder must not be imported.
    with subprocess.Popen(
        [sys.executable, "-P", "-m", module, argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
        cwd="/",
    ) as child:
        try:
            assert child.stdin is not None
            with suppress(BrokenPipeError):
                child.stdin.write(input_bytes)
                child.stdin.close()
            give_up = time.monotonic() + seconds
            output = _read(child, give_up, stop or threading.Event())
            # The child closes its output before it ends.
            return child.wait(max(_POLL, give_up - time.monotonic())), output
        except subprocess.TimeoutExpired as error:
            raise GaveUpError("it took too long") from error
        finally:
            child.kill()


def _read(child: subprocess.Popen[bytes], give_up: float, stop: threading.Event) -> bytes:
    """Return what the child writes until it closes its output."""
    assert child.stdout is not None
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if stop.is_set():
                raise InterruptedRunError("interrupted", remedy="run the same command again")
            if time.monotonic() > give_up:
                raise GaveUpError("it took too long")
            if not selector.select(_POLL):
                continue
            chunk = os.read(child.stdout.fileno(), _CHUNK)
            if not chunk:
                return bytes(output)
            output += chunk
            if len(output) > MAX_OUTPUT:
                raise GaveUpError("its output is too long")


def leave_network() -> None:
    """In the child, before it starts any thread: leave the network, if the system supports it."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    if unshare is None:
        return
    # Root needs no user namespace, and could not read other users' files in it.
    if unshare(_CLONE_NEWNET) != 0 and os.geteuid() != 0:
        unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def confine(*, memory: int, seconds: int) -> None:
    """In the child, after its packages are imported: limit what it can use from now on.

    It gets `memory` more bytes, `seconds` more of CPU time and 16 more files. It cannot write files or start
    processes.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    n_open = len(os.listdir("/dev/fd"))
    limits = {
        resource.RLIMIT_AS: _address_space() + memory,
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: n_open + 16,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        # macOS does not support all of them.
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def _address_space() -> int:
    """Return the address space in use, in bytes; 0 on macOS, which ignores the limit."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return 0
