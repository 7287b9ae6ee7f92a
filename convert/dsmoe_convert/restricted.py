"""Child processes that read untrusted files, and what they may do. Knows no format.

A child inherits no environment but what finds Python's packages, no files, and no standard error. `confine`,
called in the child before it opens the file, takes away memory, CPU time, writing, processes and, where Linux
lets users have namespaces of their own, the network. macOS ignores the limit on memory and has no such
namespaces: there, time, files and processes are limited.
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
"""Bytes of an answer; that of a checkpoint with 100,000 tensors has about ten million."""
_POLL = 0.2
_CHUNK = 1 << 20
# Lists of folders, without which Python may not find its packages or their libraries.
_KEPT = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# Threads of libraries would count as processes.
_SET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000


class GaveUpError(Exception):
    """A child took too long or said too much. The text is for a message."""


def run_module(
    module: str,
    argument: str,
    *,
    seconds: float,
    input_bytes: bytes = b"",
    stop: threading.Event | None = None,
) -> tuple[int, bytes]:
    """Run `module` as a program in a child that Ctrl-C on the terminal does not reach; its exit status and
    output.

    Raises GaveUpError after `seconds` or more than MAX_OUTPUT bytes, InterruptedRunError after `stop`, and
    OSError if there can be no child.
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
            # It has closed its output, which is not yet its end.
            return child.wait(max(_POLL, give_up - time.monotonic())), output
        except subprocess.TimeoutExpired as error:
            raise GaveUpError("it took too long") from error
        finally:
            child.kill()


def _read(child: subprocess.Popen[bytes], give_up: float, stop: threading.Event) -> bytes:
    """What the child writes until it ends."""
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
                raise GaveUpError("its description is far too long")


def leave_network() -> None:
    """In the child, before anything starts a thread: have no network from now on, where that is possible."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    if unshare is None:
        return
    # In a user namespace of its own, root could no longer read other users' files.
    if unshare(_CLONE_NEWNET) != 0 and os.geteuid() != 0:
        unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def confine(*, memory: int, seconds: int) -> None:
    """In the child, once its packages are imported: allow `memory` more bytes and `seconds` more of CPU time,
    16 more files, and no file to be written and no process to be made.
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
        # macOS refuses some of them.
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def _address_space() -> int:
    """Bytes of address space in use; none where the system does not tell, which then ignores the limit."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return 0
