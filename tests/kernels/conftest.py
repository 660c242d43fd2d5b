"""Native operations over both storage dtypes, and over every instruction set this CPU has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.native.build import NativeUnavailableError, build_ahead, build_library
from kernels.native.library import NativeLibrary
from kernels.native.ops import NativeOps
from kernels.ops import Ops
from kernels.registry import native_ops

CPU_FLAGS = {"x86-64-v3": {"avx2", "fma"}}


def cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return set(lines[0].split()) if lines else set()


@pytest.fixture(scope="session", params=["native", "x86-64", "x86-64-v3"])
def library(request: pytest.FixtureRequest, native_cache: Path) -> NativeLibrary:
    march: str = request.param
    if march != "native" and not CPU_FLAGS.get(march, {"lm"}) <= cpu_flags():
        pytest.skip(f"this CPU cannot run {march} code")
    try:
        path = (
            build_library(native_cache) if march == "native" else build_ahead(native_cache, march)
        )
    except NativeUnavailableError as error:
        pytest.skip(f"no native kernels here: {error}")
    return NativeLibrary(path, 3)


@pytest.fixture(scope="session", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def native(library: NativeLibrary, dtype: torch.dtype) -> Ops:
    return native_ops(NativeOps(library, dtype))
