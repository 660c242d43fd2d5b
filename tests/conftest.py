"""Fixtures for all tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.ops import Ops
from kernels.registry import build_ops
from tests.kernels.triton_env import poisoned_memory  # noqa: F401  chooses how Triton runs
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.machine.native_libraries import share_library
from tests.support.machine.threads import own_torch_threads

CPU = torch.device("cpu")


def pytest_collection_finish() -> None:
    """The garbage collector forgets what is imported by now, which lives as long as the process.
    Each look at all of that took half a second, in the middle of whatever a test measured."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """So that the interpreter ends as usual: libraries complain of objects that outlive them."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """One torch thread: products in tests are so small that a second one only costs time."""
    with own_torch_threads():
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def native_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the native library: the one that `make install` compiled of these sources, or
    else one that is compiled once per test session, for all of its processes."""
    base = tmp_path_factory.getbasetemp()
    several = hasattr(request.config, "workerinput")  # pytest-xdist: one folder for each process
    folder = (base.parent if several else base) / "native"
    folder.mkdir(exist_ok=True)
    share_library(folder)
    return folder


@pytest.fixture(scope="session")
def reference_ops(native_cache: Path) -> Ops:
    return build_ops("reference", CPU, torch.float32, 2, native_cache)


@pytest.fixture(scope="session")
def native_ops(native_cache: Path) -> Ops:
    """Native operations over float32 storage; skips tests, with the reason, without them."""
    ops = build_ops("auto", CPU, torch.float32, 2, native_cache)
    if ops.backends["linear"].name != "native":
        pytest.skip(f"no native kernels here: {ops.backends['linear']}")
    return ops


@pytest.fixture(scope="module")
def tiny_engine(native_ops: Ops) -> TinyEngine:
    """A tiny random model over the native operations: results do not depend on the batch."""
    return TinyEngine(random_llama(), native_ops)
