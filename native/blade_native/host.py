"""What this process may take of the machine: the kernel's view, narrowed by the cgroups (v1 or v2) it lives in."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def available_cores(root: Path = ROOT) -> int:
    """CPU cores this process may keep busy: its affinity mask, narrowed by the CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_cpu_quota(folder) for folder in _cgroups(root))
    return max(1, min([cores, *(int(quota) for quota in quotas if quota is not None)]))


def available_memory(root: Path = ROOT) -> int:
    """Bytes of RAM free to take without swapping: MemAvailable, narrowed by the memory limits."""
    rooms = (_memory_room(folder) for folder in _cgroups(root))
    return max(0, min([_mem_available(root), *(room for room in rooms if room is not None)]))


def last_level_cache(root: Path = ROOT) -> int:
    """Bytes of the largest cache that the first CPU sees, be it shared with others; 0 where the system is silent."""
    paths = root.glob("sys/devices/system/cpu/cpu0/cache/index*/size")
    sizes = [_text(path).strip() for path in paths]  # "32768K"
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K") and size[:-1].isdigit()), default=0)


def _mem_available(root: Path) -> int:
    available = _fields(root / "proc/meminfo").get("MemAvailable:")  # kB
    if available is not None:
        return available * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups(root: Path) -> Iterator[Path]:
    """Folders that may hold this process's limits: its cgroups and all above, for any of them may bind. In a container
    the path is often that of the host and only the topmost folder is there."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup" / controllers
        folder = mount / path.lstrip("/")
        yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(mount))


def _cpu_quota(folder: Path) -> float | None:
    """In cores."""
    quota, _, period = _text(folder / "cpu.max").partition(" ")  # v2: "max 100000" or "150000 100000"
    quota = quota or _text(folder / "cpu.cfs_quota_us")  # v1: -1 is none
    period = period or _text(folder / "cpu.cfs_period_us")
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except ValueError:
        return None


def _memory_room(folder: Path) -> int | None:
    """Limit less use in bytes, page cache that can be dropped not counted as used."""
    stat = _fields(folder / "memory.stat")
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            return int(_text(folder / limit)) - int(_text(folder / used)) + stat.get(cache, 0)
        except ValueError:  # "max", or no such file
            continue
    return None


def _fields(path: Path) -> dict[str, int]:
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    """Of a file of the kernel's; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def keep_freed_memory(most: int = 32 << 20) -> None:
    """Have glibc keep what activations of up to `most` bytes give back, up to 1 GiB of it. By default it returns them
    to the system, and every step pays for zeroed pages anew (4 us each). Other C libraries are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, most)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def release_freed_memory() -> None:
    """Have glibc return what it keeps after all; the next activations pay for new pages once."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
