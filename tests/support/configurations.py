"""Configurations of no machine in particular."""

from __future__ import annotations

from pathlib import Path

from configs.resolve import HostConfig, HostFacts, resolve_host
from configs.schema import Config

NOWHERE = HostFacts(num_cpus=1, cache_dir=Path("/nowhere"))


def hosted(config: Config | None = None) -> HostConfig:
    """`config`, or the defaults, with what a machine decides."""
    return resolve_host(config or Config(), NOWHERE)
