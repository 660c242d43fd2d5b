"""Fill in every setting that the operator left open. Pure functions of facts and configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs.load import ConfigError
from configs.schema import Config


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


def resolve_host(config: Config, host: HostFacts) -> Config:
    """Set threads, cache folder and the model's name in the API."""
    served_name = config.model.served_name or config.model.source
    threads = config.kernels.threads or host.num_cpus
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"served_name": served_name}),
            "kernels": config.kernels.model_copy(update={"threads": threads}),
            "files": config.files.model_copy(update={"dir": config.files.dir or host.cache_dir}),
        }
    )


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


def resolve_model(config: Config, facts: ModelFacts) -> Config:
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
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"max_model_len": length}),
            "cache": config.cache.model_copy(update={"num_blocks": num_blocks}),
        }
    )


def _affordable_blocks(config: Config, facts: ModelFacts, per_sequence: int) -> int:
    """As many blocks as the memory share holds, but no more than can ever be in use."""
    affordable = int(facts.free_bytes * config.cache.memory_fraction) // facts.bytes_per_block
    if affordable < 1:
        raise ConfigError(
            f"cache.memory_fraction = {config.cache.memory_fraction} of {facts.free_bytes} free "
            f"bytes does not hold one cache block of {facts.bytes_per_block} bytes"
        )
    return min(affordable, per_sequence * config.scheduler.max_num_seqs)
