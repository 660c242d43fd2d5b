"""Settings that the operator left open are filled in from facts of the machine and the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.load import ConfigError, load_config
from configs.resolve import (
    HostConfig,
    HostFacts,
    ModelFacts,
    ResolvedConfig,
    resolve_host,
    resolve_model,
    with_sizes,
)
from configs.schema import Config

HOST = HostFacts(num_cpus=6, cache_dir=Path("/cache"))
MODEL = ModelFacts(context_length=100, bytes_per_block=10, free_bytes=1000)


@pytest.mark.parametrize(
    ("overrides", "served_name", "threads", "folder"),
    [
        ([], "smollm2-135m-instruct", 6, "/cache"),
        (["model.source=org/name"], "org/name", 6, "/cache"),
        (["model.source=org/name", "model.served_name=mine"], "mine", 6, "/cache"),
        (["kernels.threads=2"], "smollm2-135m-instruct", 2, "/cache"),
        (["files.dir=/other"], "smollm2-135m-instruct", 6, "/other"),
    ],
    ids=["defaults", "source", "served-name", "threads", "folder"],
)
def test_the_host_fills_in_what_is_open(
    overrides: list[str], served_name: str, threads: int, folder: str
) -> None:
    config = resolve_host(load_config(None, overrides), HOST)
    assert config.model.served_name == served_name
    assert config.kernels.threads == threads
    assert config.files.dir == Path(folder)


def hosted(*overrides: str) -> HostConfig:
    return resolve_host(load_config(None, overrides), HOST)


def test_resolving_changes_nothing_else_and_is_idempotent() -> None:
    config = load_config(None, ["server.port=1", "cache.memory_fraction=0.5"])
    resolved = resolve_model(resolve_host(config, HOST), MODEL)
    assert resolve_model(resolve_host(resolved, HOST), MODEL) == resolved
    filled = {
        "model": {"served_name": "smollm2-135m-instruct", "max_model_len": 100},
        "kernels": {"threads": 6},
        "files": {"dir": Path("/cache")},
        "cache": {"num_blocks": 50},
    }
    expected = config.model_dump()
    for section, keys in filled.items():
        expected[section] |= keys
    assert resolved == ResolvedConfig.model_validate(expected)


@pytest.mark.parametrize(
    ("overrides", "max_model_len", "num_blocks"),
    [
        ([], 100, 30),  # 0.3 x 1000 bytes / 10
        (["cache.memory_fraction=0.5"], 100, 50),
        (["cache.memory_fraction=0.05"], 80, 5),  # the cache bounds the context
        (["cache.memory_fraction=0.01"], 16, 1),
        (["scheduler.max_num_seqs=2"], 100, 14),  # no more than 2 x 7 are ever in use
        (["cache.num_blocks=7"], 100, 7),
        (["cache.num_blocks=3"], 48, 3),
        (["cache.num_blocks=1000"], 100, 1000),  # the operator set it
        (["model.max_model_len=100"], 100, 30),
        (["model.max_model_len=17", "scheduler.max_num_seqs=1"], 17, 2),
        (["model.max_model_len=16", "scheduler.max_num_seqs=1"], 16, 1),
        (["model.max_model_len=17", "cache.num_blocks=2"], 17, 2),
        (["model.max_model_len=1", "cache.num_blocks=1"], 1, 1),
    ],
    ids=str,
)
def test_context_and_cache_fit_each_other(
    overrides: list[str], max_model_len: int, num_blocks: int
) -> None:
    config = resolve_model(hosted(*overrides), MODEL)
    assert (config.model.max_model_len, config.cache.num_blocks) == (max_model_len, num_blocks)


@pytest.mark.parametrize(
    ("overrides", "facts", "explanation"),
    [
        (["model.max_model_len=101"], {}, "model.max_model_len = 101.*made for 100 tokens"),
        (
            ["model.max_model_len=33", "cache.num_blocks=2"],
            {},
            "cache.num_blocks = 2: .*max_model_len = 33 tokens needs 3 blocks of 16",
        ),
        (["model.max_model_len=100"], {"free_bytes": 200}, "cache.num_blocks = 6: .*needs 7"),
        ([], {"free_bytes": 33}, "0.3 of 33 free bytes does not hold one cache block of 10"),
        ([], {"free_bytes": 0}, "of 0 free bytes"),
    ],
    ids=["longer-than-the-model", "too-few-blocks", "too-little-memory", "no-block", "no-memory"],
)
def test_impossible_sizes_are_refused_with_both_numbers(
    overrides: list[str], facts: dict[str, int], explanation: str
) -> None:
    with pytest.raises(ConfigError, match=explanation):
        resolve_model(hosted(*overrides), replace(MODEL, **facts))


def test_a_given_number_of_blocks_needs_no_free_memory() -> None:
    config = hosted("cache.num_blocks=7")
    assert resolve_model(config, replace(MODEL, free_bytes=0)).cache.num_blocks == 7


SIZES = {"model.max_model_len", "cache.num_blocks"}
OPEN = {"model.served_name", "kernels.threads", "files.dir"}


@pytest.mark.parametrize(
    ("wanted", "config", "named"),
    [
        (HostConfig, Config(), OPEN),
        (ResolvedConfig, Config(), OPEN | SIZES),
        (ResolvedConfig, hosted(), SIZES),
    ],
    ids=["host", "everything", "sizes"],
)
def test_what_is_left_open_is_refused_by_name(
    wanted: type[HostConfig], config: Config, named: set[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        wanted.model_validate_json(config.model_dump_json())
    assert {".".join(map(str, detail["loc"])) for detail in caught.value.errors()} == named


@pytest.mark.parametrize("key", ["model.max_model_len", "cache.num_blocks"])
def test_one_size_that_is_left_open_is_refused_by_name(key: str) -> None:
    content = with_sizes(hosted(), max_model_len=64, num_blocks=9).model_dump()
    section, name = key.split(".")
    content[section][name] = None
    with pytest.raises(ValidationError, match=rf"1 validation error[^\n]*\n{key}\n"):
        ResolvedConfig.model_validate(content)


def test_a_configuration_crosses_between_processes_unchanged() -> None:
    host = hosted("server.port=1", "capture.dir=/captured", "capture.consent=true")
    resolved = with_sizes(host, max_model_len=64, num_blocks=9)
    for config in (host, resolved):
        assert type(config).model_validate_json(config.model_dump_json()) == config
    assert HostConfig.model_validate_json(resolved.model_dump_json()).model_dump() == (
        resolved.model_dump()
    )


def test_all_kinds_of_configuration_have_the_same_keys() -> None:
    keys = {name: list(section) for name, section in Config().model_dump().items()}
    for config in (hosted(), with_sizes(hosted(), max_model_len=64, num_blocks=9)):
        found = config.model_dump()
        assert {name: list(section) for name, section in found.items()} == keys
