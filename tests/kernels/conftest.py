"""Native operations for both storage dtypes and every instruction set of this CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.native.build import (
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
from tests.support.native_libraries import share_variant

VARIANTS = [
    pytest.param(variant, marks=pytest.mark.extended, id=variant.name)
    for variant in variants()
    if variant.name in ("avx512", "avx2", "sse2")
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
    except NativeUnavailableError as error:
        pytest.skip(f"no native kernels here: {error}")
    return NativeLibrary(path, 3)


@pytest.fixture(scope="session", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def bound(library: NativeLibrary, dtype: torch.dtype) -> NativeOps:
    """All C++ functions, including helpers of an operation."""
    return NativeOps(library, dtype)


@pytest.fixture(scope="session")
def native(bound: NativeOps) -> Ops:
    return native_ops(bound)
