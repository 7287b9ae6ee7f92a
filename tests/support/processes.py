"""The children and the state of processes."""

from __future__ import annotations

import os
import subprocess


def children_of(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    listed = subprocess.run(["ps", "-A", "-o", "ppid=,pid="], capture_output=True, text=True, check=True)
    pairs = [line.split() for line in listed.stdout.splitlines()]
    return [int(child) for parent, child in pairs if int(parent) == pid]


def is_gone(pid: int) -> bool:
    """Return whether no process has that id, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
