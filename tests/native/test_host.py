"""Cores and memory as narrowed by cgroups, read from made-up /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blade_native.host import (
    available_cores,
    available_memory,
    keep_freed_memory,
    last_level_cache,
    release_freed_memory,
)

GIB = 1 << 30


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def test_without_limits(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert available_cores(root) == 8
    assert available_memory(root) == 8 * GIB


def test_version_2_limits_of_any_ancestor_bind(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/slice/service\n",
        "sys/fs/cgroup/slice/cpu.max": "350000 100000\n",
        "sys/fs/cgroup/slice/service/cpu.max": "max 100000\n",
        "sys/fs/cgroup/slice/memory.max": str(4 * GIB),
        "sys/fs/cgroup/slice/memory.current": str(3 * GIB),
        "sys/fs/cgroup/slice/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB}\n",
        "sys/fs/cgroup/slice/service/memory.max": "max\n",
        "sys/fs/cgroup/slice/service/memory.current": str(GIB),
    }
    root = tree(tmp_path, files)
    assert available_cores(root) == 3
    assert available_memory(root) == 2 * GIB


def test_version_1_in_a_container_that_sees_only_its_own(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "3:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 2}\n",
    }
    root = tree(tmp_path, files)
    assert available_cores(root) == 1  # half a core still takes a thread
    assert available_memory(root) == GIB + GIB // 2


def test_more_in_use_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": str(GIB),
        "sys/fs/cgroup/memory.current": str(2 * GIB),
    }
    assert available_memory(tree(tmp_path, files)) == 0


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    root = tree(tmp_path, {})
    assert available_cores(root) == 8
    assert available_memory(root) == 8 * GIB
    (root / "proc/meminfo").unlink()
    assert available_memory(root) > 0


def test_this_machine() -> None:
    assert available_cores() >= 1
    assert available_memory() > 0


def test_freed_memory_is_returned_when_asked() -> None:
    keep_freed_memory()
    parts = [bytes([i]) * (1 << 20) for i in range(64)]
    resident = _resident()
    del parts
    release_freed_memory()
    assert _resident() < resident - (48 << 20)


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_largest_cache_is_the_last(tmp_path: Path) -> None:
    cache = "sys/devices/system/cpu/cpu0/cache"
    assert (
        last_level_cache(tree(tmp_path, {f"{cache}/index0/size": "48K\n", f"{cache}/index3/size": "266240K\n"}))
        == 260 << 20
    )
    assert last_level_cache(tmp_path / "nowhere") == 0
