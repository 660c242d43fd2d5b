"""The configuration of a process on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from configs.env import default_cache_dir, environment, num_cpus
from configs.load import load_config
from configs.resolve import HostFacts, resolve_host
from configs.schema import Config


def this_host() -> HostFacts:
    """What this machine offers to this process."""
    return HostFacts(num_cpus(), default_cache_dir())


def host_config(path: Path | None, overrides: Iterable[str]) -> Config:
    """File, environment and overrides merged, and resolved for this machine.

    Raises:
        ConfigError: as `load_config`.
    """
    return resolve_host(load_config(path, overrides, environment()), this_host())
