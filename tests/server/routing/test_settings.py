"""The configuration of several engines."""

from __future__ import annotations

import pytest

from configs.env import num_cpus
from configs.load import ConfigError
from server.routing.settings import check_one_engine, config_of, engine_cpus, with_threads


def test_arguments_are_a_file_and_keys() -> None:
    config = config_of({"config": "smollm2-fp32", "replicas": "3", "server.port": "1"})
    assert (config.model.dtype, config.fleet.replicas, config.server.port) == ("float32", 3, 1)
    with pytest.raises(ConfigError, match=r"fleet\.replica"):
        config_of({"fleet.replica": "3"})
    with pytest.raises(ConfigError, match=r"parallel\.roles = prefill:1,decode:1: .* null"):
        check_one_engine(config_of({"parallel.roles": "prefill:1,decode:1"}))


@pytest.mark.parametrize(
    ("arguments", "cpus", "threads"),
    [
        ({"replicas": "1"}, num_cpus(), num_cpus()),
        ({"replicas": "1000"}, 1, 1),
        ({"replicas": "1", "fleet.max_replicas": "1000"}, 1, 1),
        ({"kernels.threads": "7"}, 7, 7),
        ({"fleet.cpus": "0.5"}, 0.5, 1),
        ({"fleet.cpus": "3", "parallel.tensor": "2"}, 3, 3),
        ({"fleet.cpus": "3", "kernels.threads": "7"}, 3, 7),
    ],
)
def test_engines_share_the_cores(arguments: dict[str, str], cpus: float, threads: int) -> None:
    config = config_of(arguments)
    assert engine_cpus(config) == cpus
    assert with_threads(config).kernels.threads == threads
