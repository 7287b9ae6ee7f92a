"""The memory that another process has taken, as the system counts it."""

from __future__ import annotations

import subprocess
from pathlib import Path

_PROC = Path("/proc")
_KILOBYTE = 1024


def peak_memory(pid: int, proc: Path = _PROC) -> int | None:
    """The most bytes of memory that a living process has had, mapped files included; None if it is gone.

    Where the system keeps no peak (macOS), what it has now: an engine that has worked gives nothing back.
    """
    try:
        status = (proc / str(pid) / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None if proc.joinpath("self").exists() else _now(pid)
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * _KILOBYTE
    return None


def _now(pid: int) -> int | None:
    command = ["ps", "-o", "rss=", "-p", str(pid)]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return None
    return int(told) * _KILOBYTE if told.isdigit() else None
