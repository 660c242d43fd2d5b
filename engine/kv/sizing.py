"""How much memory is left for the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

logger = logging.getLogger(__name__)
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
MIB = 2**20


def free_bytes(device: torch.device) -> int:
    """Bytes that are free for new allocations on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limit = _cgroup_room(CGROUP)
    available = _available_bytes(MEMINFO.read_text(encoding="ascii"))
    return available if limit is None else min(available, limit)


def check_reserve(largest_step: Callable[[], None], reserved: int, device: torch.device) -> None:
    """Measure the largest step, and log whether the memory that was kept for it suffices. A CPU's
    memory cannot be measured so, and is not all given away."""
    if device.type != "cuda":
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    largest_step()
    torch.cuda.synchronize(device)
    used = torch.cuda.max_memory_allocated(device) - before
    said = f"the largest step takes {used / MIB:.0f} MiB, {reserved / MIB:.0f} MiB are kept for it"
    if used <= reserved:
        logger.info("memory: %s", said)
    else:
        logger.warning(
            "memory: %s: lower cache.memory_fraction or scheduler.max_num_batched_tokens", said
        )


def _available_bytes(meminfo: str) -> int:
    """MemAvailable: what could be allocated without swapping."""
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError(f"{MEMINFO} has no MemAvailable")


def _cgroup_room(folder: Path) -> int | None:
    """Bytes left under the container's limit (cgroup v2), None without a limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + _reclaimable_bytes(folder))


def _reclaimable_bytes(folder: Path) -> int:
    """Bytes of files in the page cache, such as the model just read: they count as used, but are
    freed when needed."""
    try:
        stat = (folder / "memory.stat").read_text(encoding="ascii")
    except OSError:
        return 0
    entries = dict(line.split() for line in stat.splitlines())
    return int(entries.get("inactive_file", 0))
