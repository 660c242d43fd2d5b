"""The one place where environment variables are read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path


def environment() -> Mapping[str, str]:
    """The variables of this process."""
    return os.environ


def engine_environment() -> dict[str, str]:
    """The engine process's variables: ranks of one machine connect over its loopback interface."""
    return {"NCCL_SOCKET_IFNAME": "lo"} | dict(os.environ)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/aerie, or ~/.cache/aerie (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "aerie"


def num_cpus(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: the smaller of its affinity and its cgroup v2 CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()
        return max(1, min(cores or 1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or "max": no quota
        return cores or 1
