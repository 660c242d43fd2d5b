"""Native operations for both storage dtypes and every instruction set of this CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.native.build import (
    AVX512,
    NativeCompileError,
    NativeUnavailableError,
    Variant,
    build_library,
    cpu_flags,
    variants,
)
from kernels.native.library import NativeLibrary
from kernels.native.ops import NativeOps
from kernels.ops import Ops
from kernels.registry import native_ops
from tests.support.machine.native_libraries import share_variant

# AMX code with plain C++ in place of the tile registers
SOFTWARE_TILES = Variant("software-tiles", ("-march=x86-64-v4", "-DAERIE_SOFTWARE_TILES"), AVX512)
TESTED = [variant for variant in variants() if variant.name in ("avx512", "avx2", "sse2")]
if TESTED:
    TESTED.append(SOFTWARE_TILES)
VARIANTS = [
    pytest.param(variant, marks=pytest.mark.extended, id=variant.name) for variant in TESTED
]


@pytest.fixture(scope="session", params=[pytest.param(None, id="native"), *VARIANTS])
def library(request: pytest.FixtureRequest, native_cache: Path) -> NativeLibrary:
    variant: Variant | None = request.param
    if variant is not None and not variant.needs <= cpu_flags():
        pytest.skip(f"this CPU cannot run {variant.name} code")
    try:
        path = (
            build_library(native_cache) if variant is None else share_variant(variant, native_cache)
        )
    except NativeCompileError:
        raise  # every instruction set must compile where there is a compiler
    except NativeUnavailableError as error:
        pytest.skip(f"no native kernels here: {error}")
    return NativeLibrary(path, 3)


@pytest.fixture(scope="session", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def bound(library: NativeLibrary, dtype: torch.dtype) -> NativeOps:
    """All C++ functions, including helpers of an operation."""
    if dtype is torch.float32 and SOFTWARE_TILES.name in library.path.name:
        pytest.skip("tiles take no float32 numbers")
    return NativeOps(library, dtype, 16)


@pytest.fixture(scope="session")
def native(bound: NativeOps) -> Ops:
    return native_ops(bound)


@pytest.fixture(scope="session", params=[8, 16], ids=["8-bit-inputs", "16-bit-inputs"])
def input_bits(request: pytest.FixtureRequest) -> int:
    """Of products with quantised weights."""
    bits: int = request.param
    return bits


@pytest.fixture(scope="session")
def grouped(bound: NativeOps, dtype: torch.dtype, input_bits: int) -> Ops:
    """Native operations with either rounding of inputs."""
    return native_ops(NativeOps(bound.library, dtype, input_bits))
