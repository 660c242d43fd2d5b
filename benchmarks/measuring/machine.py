"""The machine and software of a benchmark run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from server.version import version

PACKAGES = ("torch", "triton", "transformers", "numpy")


def facts() -> dict[str, object]:
    """Date, device and versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(),
        "cores": torch.get_num_threads() if torch.cuda.is_available() else _cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"aerie": version(), **{name: _version(name) for name in PACKAGES}},
    }


def load() -> tuple[float, float, float]:
    """The average number of processes that ran or waited for a processor in the last 1, 5 and 15
    minutes: says whether the machine had other work."""
    one, five, fifteen = os.getloadavg()
    return round(one, 1), round(five, 1), round(fifteen, 1)


def busy(seconds: float) -> float:
    """The share of all processors' time that is used during the next `seconds`."""
    before = _jiffies()
    time.sleep(seconds)
    idle, total = (after - old for after, old in zip(_jiffies(), before, strict=True))
    return 1 - idle / total if total else 0.0


def _jiffies() -> tuple[int, int]:
    """The idle time of all processors since the start of the machine, and all time."""
    counts = [int(count) for count in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return counts[3] + counts[4], sum(counts)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    from configs.env import num_cpus

    return num_cpus()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_slug() -> str:
    """The device's name as part of a file name."""
    words = device_name().lower().replace("nvidia", "").split()
    return "-".join("".join(c for c in word if c.isalnum()) for word in words) or "unknown"
