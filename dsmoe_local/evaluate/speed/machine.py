"""The machine that speeds are measured on: its processor, its memory, and how busy it is."""

from __future__ import annotations

import os
import platform
import threading
from dataclasses import dataclass
from pathlib import Path

from dsmoe_local.base.progress import Listener, Note, ignore
from dsmoe_local.base.text import safe_line
from dsmoe_local.evaluate.speed.bandwidth import Bandwidth, measure_bandwidth

_CPU_INFO = Path("/proc/cpuinfo")
_BUSY, _BUSY_PER_CORE = 0.3, 0.1  # load averages above which other programs are felt


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it was measured. `load` is the load average before; 0 where the system does not tell."""

    cpu: str
    bandwidth: Bandwidth
    load: float


def look_at_machine(
    n_threads: int, listen: Listener = ignore, stop: threading.Event | None = None
) -> Machine:
    """Measure the machine; a note says if it is busy. Setting `stop` raises InterruptedRunError."""
    load = _load_average()
    if load > max(_BUSY, _BUSY_PER_CORE * (os.cpu_count() or 1)):
        listen(Note(f"the machine is busy (load {load:.1f}): figures will be too low, and scattered"))
    return Machine(cpu_name(), measure_bandwidth(n_threads, listen, stop), load)


def cpu_name(cpu_info: Path = _CPU_INFO) -> str:
    """What the processor calls itself."""
    try:
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return safe_line(value.strip(), 80)
    except OSError:
        pass  # not Linux
    return safe_line(platform.processor() or platform.machine(), 80)


def _load_average() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0
