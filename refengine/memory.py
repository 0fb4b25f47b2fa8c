"""How much memory this machine has to give. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory_bytes() -> int:
    """Bytes that a new process could use without swapping, container limits included."""
    candidates = [_proc_available(), *_cgroup_available()]
    known = [value for value in candidates if value is not None]
    return min(known) if known else _physical()


def _physical() -> int:
    """All memory, where nothing better is known."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _proc_available() -> int | None:
    """Linux's own estimate."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_available() -> list[int | None]:
    """What is left under a container's limit (cgroup v2, then v1)."""
    pairs = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    )
    found: list[int | None] = []
    for limit_file, used_file in pairs:
        try:
            limit = Path(limit_file).read_text().strip()
            used = int(Path(used_file).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            found.append(max(int(limit) - used, 0))
    return found
