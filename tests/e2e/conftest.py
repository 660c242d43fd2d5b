"""Live servers, on a tiny random Llama unless a test needs sensible answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.models.tiny_llama import TinyLlama, write_tiny_llama
from tests.support.servers.live_fleet import LiveFleet
from tests.support.servers.live_server import LiveServer

MODEL = "tiny"
MAX_LEN = 32_768
NUM_BLOCKS = 2048


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context long enough for requests that outlast a test."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_tiny_llama(folder, TinyLlama(max_position_embeddings=MAX_LEN))
    return folder


@pytest.fixture(scope="session")
def make_server(tiny_folder: Path, native_cache: Path) -> Callable[..., LiveServer]:
    """Builds servers on the tiny model; arguments are those of `LiveServer`."""

    def make(*overrides: str, **options: Any) -> LiveServer:
        return LiveServer(
            f"model.source={tiny_folder}",
            f"model.served_name={MODEL}",
            "model.dtype=float32",
            f"cache.num_blocks={NUM_BLOCKS}",
            "kernels.threads=1",
            f"files.dir={native_cache}",
            *overrides,
            **options,
        )

    return make


@pytest.fixture(scope="session")
def make_fleet(make_server: Callable[..., LiveServer]) -> Callable[..., LiveFleet]:
    """Builds fleets on the tiny model; arguments are those of `LiveServer`."""

    def make(*overrides: str, **options: Any) -> LiveFleet:
        return LiveFleet(*make_server().overrides, *overrides, **options)

    return make


@pytest.fixture(scope="session")
def server(make_server: Callable[..., LiveServer]) -> Iterator[LiveServer]:
    """One server for all tests that do not change it; it must exit with 0."""
    with make_server() as live:
        yield live
        assert live.stop() == 0
