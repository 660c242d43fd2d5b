"""Fill in everything the operator left open. Pure: facts in, configuration out.

The types say what is known: of a `Config` what the operator wrote, of a `HostConfig` also what the
machine decides, of a `ResolvedConfig` everything. All three have the same keys, so that the JSON of
one is read as another, and refused where a key is still open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import ConfigError
from configs.schema import (
    CacheConfig,
    CacheDirConfig,
    Config,
    KernelsConfig,
    ModelConfig,
    Positive,
)


class HostModelConfig(ModelConfig):
    """Its name in the API is known."""

    served_name: str


class HostKernelsConfig(KernelsConfig):
    """The number of threads is known."""

    threads: Positive


class HostCacheDirConfig(CacheDirConfig):
    """The folder is known."""

    dir: Path


class HostConfig(Config):
    """What this machine decides is known; the model has not been looked at."""

    model: HostModelConfig
    kernels: HostKernelsConfig
    files: HostCacheDirConfig


class ResolvedModelConfig(HostModelConfig):
    """The context length is known."""

    max_model_len: Positive


class ResolvedCacheConfig(CacheConfig):
    """The number of blocks is known."""

    num_blocks: Positive


class ResolvedConfig(HostConfig):
    """No size is left open."""

    model: ResolvedModelConfig
    cache: ResolvedCacheConfig


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What this process may use of the machine."""

    num_cpus: int
    cache_dir: Path


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the loaded model can do, needs, and leaves free."""

    context_length: int  # tokens that the model was made for
    bytes_per_block: int
    free_bytes: int  # memory that the weights leave free


def resolve_host(config: Config, host: HostFacts) -> HostConfig:
    """Set threads, cache folder and the model's name in the API."""
    found: dict[str, dict[str, Any]] = {
        "model": {"served_name": config.model.served_name or config.model.source},
        "kernels": {"threads": config.kernels.threads or host.num_cpus},
        "files": {"dir": config.files.dir or host.cache_dir},
    }
    return HostConfig.model_validate(_filled(config, found))


def context_length(config: Config, of_model: int) -> int:
    """Prompt + output tokens that one sequence may have; the model was made for `of_model`.

    Raises:
        ConfigError: the configuration asks for more.
    """
    length = config.model.max_model_len or of_model
    if length > of_model:
        raise ConfigError(
            f"model.max_model_len = {length}: the model was made for {of_model} tokens"
        )
    return length


def resolve_model(config: HostConfig, facts: ModelFacts) -> ResolvedConfig:
    """Set the context length and the number of cache blocks.

    Raises:
        ConfigError: a context longer than the model's, or a cache too small for one sequence.
    """
    length = context_length(config, facts.context_length)
    per_sequence = -(-length // config.cache.block_size)
    num_blocks = config.cache.num_blocks or _affordable_blocks(config, facts, per_sequence)
    if config.model.max_model_len is None:
        length = min(length, num_blocks * config.cache.block_size)
    elif num_blocks < per_sequence:
        raise ConfigError(
            f"cache.num_blocks = {num_blocks}: one sequence of model.max_model_len = {length} "
            f"tokens needs {per_sequence} blocks of {config.cache.block_size}"
        )
    return with_sizes(config, max_model_len=length, num_blocks=num_blocks)


def with_sizes(config: HostConfig, *, max_model_len: int, num_blocks: int) -> ResolvedConfig:
    """`config` with sizes that were chosen for it."""
    sizes = {"model": {"max_model_len": max_model_len}, "cache": {"num_blocks": num_blocks}}
    return ResolvedConfig.model_validate(_filled(config, sizes))


def shared_out(config: HostConfig, num_engines: int) -> HostConfig:
    """The configuration of one of several engines on this machine: its share of the cores, and of
    the memory for caches. What passes between engines takes as much as a cache, at most."""
    threads = max(1, config.kernels.threads // num_engines)
    fraction = config.cache.memory_fraction / (num_engines + 1)
    shares: dict[str, dict[str, Any]] = {
        "kernels": {"threads": threads},
        "cache": {"memory_fraction": fraction},
    }
    return HostConfig.model_validate(_filled(config, shares))


def _filled(config: Config, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The keys and values of `config`, with what was found for some of its sections."""
    tree = config.model_dump()
    return tree | {section: tree[section] | keys for section, keys in found.items()}


def _affordable_blocks(config: Config, facts: ModelFacts, per_sequence: int) -> int:
    """As many blocks as the memory share holds, but no more than can ever be in use."""
    affordable = int(facts.free_bytes * config.cache.memory_fraction) // facts.bytes_per_block
    if affordable < 1:
        raise ConfigError(
            f"cache.memory_fraction = {config.cache.memory_fraction} of {facts.free_bytes} free "
            f"bytes does not hold one cache block of {facts.bytes_per_block} bytes"
        )
    return min(affordable, per_sequence * config.scheduler.max_num_seqs)
