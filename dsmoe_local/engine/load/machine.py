"""What this machine offers: processor cores and memory. Reads the system, decides nothing."""

from __future__ import annotations

import math
import os
from pathlib import Path

_PROC = Path("/proc")
_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def physical_cores(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Cores this process may run on, hyperthreads counted once; no more than its cgroups' quotas allow."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS
        return os.cpu_count() or 1
    siblings = {_read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    quotas = [_cpu_quota(folder) for folder in _own_cgroups(proc, cgroups, "cpu")]
    return max(1, int(min([len(siblings), *quotas])))


def _cpu_quota(folder: Path) -> float:
    """How many processors a cgroup, v2 or v1, may use; infinity without a limit."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    # Without a limit the quota is "max" in v2, -1 in v1.
    known = quota.isdecimal() and period.isdecimal() and int(period) > 0
    return int(quota) / int(period) if known else math.inf


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes that may be allocated without swapping: what the system says is available, or the cgroup's limit.

    Page cache counts as available, in a cgroup too: the kernel takes it back.
    """
    system = _system_available(proc)
    rooms = map(_cgroup_room, _own_cgroups(proc, cgroups, "memory"))
    return max(0, min([system, *(room for room in rooms if room is not None)]))


def _system_available(proc: Path) -> int:
    for line in _read(proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    # macOS tells no figure without its own API; three quarters of the memory is what it lets one process
    # wire.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


def _own_cgroups(proc: Path, cgroups: Path, controller: str) -> list[Path]:
    """This process's cgroup folders of a controller with all their parents, for v2 and v1."""
    folders: dict[Path, None] = {}
    for line in _read(proc / "self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # v1 mounts each controller, or several of them together, in a folder of its own.
        for root in [cgroups / controller, cgroups / controllers] if controllers else [cgroups]:
            folder = root / path.lstrip("/")
            # In a container the path may not exist below the mount: the mount's root is then our own group.
            folders |= dict.fromkeys(f for f in (folder, *folder.parents) if f == root or root in f.parents)
    return list(folders)


def _cgroup_room(folder: Path) -> int | None:
    """Bytes left below this group's limit; None without a limit."""
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
