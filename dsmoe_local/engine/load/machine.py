"""The CPU cores and the memory that this process may use, and the name of the processor."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

from dsmoe_local.base.text import safe_line

_PROC = Path("/proc")
_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def cpu_name(cpu_info: Path = _PROC / "cpuinfo") -> str:
    """Return the name of the processor."""
    try:
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return safe_line(value.strip(), 80)
    except OSError:
        pass  # not Linux
    return safe_line(platform.processor() or platform.machine(), 80)


def physical_cores(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Return the number of physical cores that this process may use. CPU quotas of cgroups limit it."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS
        return os.cpu_count() or 1
    siblings = {_read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    quotas = [_cpu_quota(folder) for folder in _own_cgroups(proc, cgroups, "cpu")]
    return max(1, int(min([len(siblings), *quotas])))


def _cpu_quota(folder: Path) -> float:
    """Return how many CPUs a cgroup (v2 or v1) may use; infinity without a limit."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    # Without a limit the quota is "max" in v2, -1 in v1.
    known = quota.isdecimal() and period.isdecimal() and int(period) > 0
    return int(quota) / int(period) if known else math.inf


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Return the bytes that can be allocated without swapping, limited by the cgroups of this process.

    Page cache counts as available, also in a cgroup, since the kernel can drop it.
    """
    system = _system_available(proc)
    limits = map(_cgroup_available, _own_cgroups(proc, cgroups, "memory"))
    return max(0, min([system, *(limit for limit in limits if limit is not None)]))


def resident_memory(pid: int, proc: Path = _PROC) -> int:
    """Return the bytes of a process that are in memory; 0 if it is gone, or on systems without /proc."""
    fields = _read(proc / f"{pid}/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def _system_available(proc: Path) -> int:
    for line in _read(proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    # macOS does not report it. There one process may wire three quarters of the memory.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


def _own_cgroups(proc: Path, cgroups: Path, controller: str) -> list[Path]:
    """Return this process's cgroup folders of a controller and all their parents, for v2 and v1."""
    folders: dict[Path, None] = {}
    for line in _read(proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # v1 has a folder for each controller, or for several together.
        for root in [cgroups / controller, cgroups / controllers] if controllers else [cgroups]:
            folder = root / path.lstrip("/")
            # In a container the path may not exist below the mount, whose root is then the own cgroup.
            folders |= dict.fromkeys(f for f in (folder, *folder.parents) if f == root or root in f.parents)
    return list(folders)


def _cgroup_available(folder: Path) -> int | None:
    """Return the bytes left below a cgroup's limit; None without a limit."""
    for limit_name, usage_name, cache_names in (
        ("memory.max", "memory.current", ("inactive_file", "active_file")),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    ):
        limit, usage = _read(folder / limit_name), _read(folder / usage_name)
        if not (limit.isdigit() and usage.isdigit()) or int(limit) >= _UNLIMITED:
            continue
        counts = dict(
            line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line
        )
        cache = sum(int(counts.get(name, "0")) for name in cache_names)
        return int(limit) - int(usage) + cache
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
