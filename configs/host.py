"""The configuration of a process on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from configs.env import default_cache_dir, environment, num_cpus
from configs.load import load_config, load_schema
from configs.resolve import HostConfig, HostFacts, resolve_host
from configs.schema import Config
from configs.training import TRAIN, HostTrainingConfig, TrainingConfig


def this_host() -> HostFacts:
    """What this process may use of this machine."""
    return HostFacts(num_cpus(), default_cache_dir())


def host_config(path: Path | None, overrides: Iterable[str]) -> HostConfig:
    """File, environment and overrides merged, and resolved for this machine.

    Raises:
        ConfigError: as `load_config`.
    """
    return resolve_host(load_config(path, overrides, environment()), this_host())


def host_training_config(path: Path | None, overrides: Iterable[str]) -> HostTrainingConfig:
    """What `aerie train-draft` is told: file and overrides merged, resolved for this machine. The
    environment is the server's.

    Raises:
        ConfigError: as `load_config`.
    """
    config = load_schema(TrainingConfig, TRAIN, path, overrides)
    host = resolve_host(
        Config(model=config.model, kernels=config.kernels, files=config.files), this_host()
    )
    found = {"kernels": host.kernels.model_dump(), "files": host.files.model_dump()}
    return HostTrainingConfig.model_validate(config.model_dump() | found)
