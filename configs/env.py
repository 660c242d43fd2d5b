"""The one place where environment variables are read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

PREFIX = "AERIE_"  # of variables that set a key of the configuration
RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it sends nothing to its makers
    # In a cluster that starts here: by default, Ray's processes give way to all others, but engines
    # are what the machine is for. To hand each event to another thread costs more than its work.
    "RAY_worker_niceness": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}


def environment() -> Mapping[str, str]:
    """The variables of this process."""
    return os.environ


def engine_environment() -> dict[str, str]:
    """The engine process's variables, without Aerie's own, which may hold keys: it is told its
    configuration. Ranks of one machine connect over its loopback interface."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {"NCCL_SOCKET_IFNAME": "lo"} | kept


def quiet_libraries() -> None:
    """Call it before they are imported: they draw no progress bars, which are no lines of a log."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TQDM_DISABLE"] = "1"


def terminal_can_draw() -> bool:
    """Whether a terminal, if there is one, can write over a line."""
    return os.environ.get("TERM", "dumb") != "dumb"


def set_up_ray() -> None:
    """Call it before Ray starts. What the operator has set stays."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)


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
