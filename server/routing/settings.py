"""The configuration of several engines, from the arguments of a deployment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from configs.env import environment, num_cpus
from configs.load import ConfigError, load_config
from configs.schema import Config


def config_of(arguments: Mapping[str, str]) -> Config:
    """The configuration for the arguments of `serve run` or of a Serve config file.

    Args:
        arguments: `config`: a YAML file or the name of a shipped one; all others are keys of the
            configuration, such as `model.source`. `replicas` is short for `fleet.replicas`.

    Raises:
        ConfigError: an argument is unknown, or its value is not allowed.
    """
    settings = dict(arguments)
    path = settings.pop("config", None)
    if "replicas" in settings:
        settings["fleet.replicas"] = settings.pop("replicas")
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return load_config(None if path is None else Path(path), overrides, environment())


def check_one_engine(config: Config) -> None:
    """ConfigError if a replica would need several engines."""
    if config.parallel.roles is not None:
        raise ConfigError(
            f"parallel.roles = {config.parallel.roles}: a replica of Ray Serve has one engine; "
            "null is possible"
        )


def with_threads(config: Config) -> Config:
    """With threads for kernels, for all ranks together, that leave room for other engines."""
    if config.kernels.threads is not None:
        return config
    threads = max(1, int(engine_cpus(config)))
    kernels = config.kernels.model_copy(update={"threads": threads})
    return config.model_copy(update={"kernels": kernels})


def engine_cpus(config: Config) -> float:
    """Cores that an engine with all its ranks gets."""
    fleet = config.fleet
    if fleet.cpus is not None:
        return fleet.cpus
    if config.kernels.threads is not None:
        return float(config.kernels.threads)
    return float(max(1, num_cpus() // (fleet.max_replicas or fleet.replicas)))
