"""What this machine offers: processor cores and memory. Reads the system, decides nothing."""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")
_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def physical_cores() -> int:
    """Cores this process may run on, hyperthreads counted once."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS
        return os.cpu_count() or 1
    siblings = {_read(_CPUS / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, min(len(siblings), _cpu_quota() or len(siblings)))


def _cpu_quota() -> int:
    """Whole processors of cgroup v2's quota; 0 without one."""
    quota, _, period = _read(_CGROUPS / "cpu.max").partition(" ")
    return max(1, int(quota) // int(period)) if quota.isdigit() and period.isdigit() else 0


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes that may be allocated without swapping: what the system says is available, or the cgroup's limit.

    Page cache counts as available, in a cgroup too: the kernel takes it back.
    """
    system = _system_available(proc)
    limits = [room for folder in _own_cgroups(proc, cgroups) if (room := _cgroup_room(folder)) is not None]
    return max(0, min([system, *limits]))


def _system_available(proc: Path) -> int:
    for line in _read(proc / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    # macOS tells no figure without its own API; three quarters of the memory is what it lets one process
    # wire.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


def _own_cgroups(proc: Path, cgroups: Path) -> list[Path]:
    """This process's cgroup folders with all their parents, for v2 and v1."""
    folders: list[Path] = []
    for line in _read(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root = cgroups if controllers == "" else cgroups / "memory"
        folder = root / path.lstrip("/")
        # In a container the path may not exist below the mount: the mount's root is then our own group.
        folders += [f for f in (folder, *folder.parents) if f == root or root in f.parents]
    return folders


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
