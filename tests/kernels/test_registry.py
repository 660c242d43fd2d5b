"""Which backend runs which operation, and that a fallback is never silent."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from kernels.native import build
from kernels.native.build import NativeUnavailableError
from kernels.ops import Backend, Ops
from kernels.registry import BACKENDS, OPERATIONS, TORCH_OPERATIONS, build_ops

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NOT_A_LIBRARY = (  # a compiler whose result cannot be loaded
    sys.executable,
    "-c",
    "import sys; '-o' in sys.argv and open(sys.argv[sys.argv.index('-o') + 1], 'w').write('?')",
)


@pytest.fixture(params=["no-compiler", "damaged-library"])
def unavailable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine without native kernels; returns words of the reason."""
    damaged = request.param == "damaged-library"
    monkeypatch.setattr(build, "find_compiler", lambda: NOT_A_LIBRARY if damaged else None)
    monkeypatch.setattr(build, "variants", lambda: ())  # nothing compiled ahead either
    return "cannot be loaded" if damaged else "pip install ziglang"


def test_an_unknown_backend_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cuda' is not one of auto, reference, native"):
        build_ops("cuda", CPU, torch.float32, 1, tmp_path)


def test_native_operations_are_refused_on_another_device(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'native' is for CPUs, not for cuda"):
        build_ops("native", GPU, torch.float32, 1, tmp_path)


def test_auto_falls_back_to_the_reference_and_says_why(tmp_path: Path, unavailable: str) -> None:
    ops = build_ops("auto", CPU, torch.float32, 1, tmp_path)
    for operation in OPERATIONS:
        backend = ops.backends[operation]
        assert backend.name == "reference"
        assert backend.reason is not None
        assert unavailable in backend.reason


def test_native_does_not_fall_back(tmp_path: Path, unavailable: str) -> None:
    with pytest.raises(NativeUnavailableError, match=unavailable):
        build_ops("native", CPU, torch.float32, 1, tmp_path)


@pytest.mark.usefixtures("unavailable")
def test_the_reference_needs_no_compiler(tmp_path: Path) -> None:
    ops = build_ops("reference", CPU, torch.float32, 1, tmp_path)
    assert ops.backends == dict.fromkeys(OPERATIONS, Backend("reference"))
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_native_kernels_where_they_can_be_had(native_ops: Ops) -> None:
    in_torch = dict.fromkeys(TORCH_OPERATIONS, Backend("reference"))
    assert native_ops.backends == dict.fromkeys(OPERATIONS, Backend("native")) | in_torch


def test_a_backend_reads_as_its_name_and_its_reason() -> None:
    assert str(Backend("native")) == "native"
    assert str(Backend("reference", "no C++ compiler")) == "reference (no C++ compiler)"


def test_products_name_the_instructions_they_use(native_ops: Ops, native_cache: Path) -> None:
    ops = build_ops("native", CPU, torch.bfloat16, 1, native_cache)
    products = {ops.backends.pop(name) for name in ("linear", "attention", "moe")}
    assert len(products) == 1
    has_dots = "avx512_bf16" in build.cpu_flags()
    names = ("amx", "avx512_bf16") if has_dots else (None,)
    assert products <= {Backend("native", name) for name in names}
    assert {ops.backends.pop(name) for name in TORCH_OPERATIONS} == {Backend("reference")}
    assert set(ops.backends.values()) == {Backend("native")}


@pytest.mark.parametrize(
    ("device", "storage", "activations"),
    [
        (CPU, torch.bfloat16, torch.float32),
        (CPU, torch.float32, torch.float32),
        (GPU, torch.bfloat16, torch.bfloat16),
        (GPU, torch.float32, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_activations_are_float32_on_a_cpu_and_as_stored_elsewhere(
    native_cache: Path,
    backend: str,
    device: torch.device,
    storage: torch.dtype,
    activations: torch.dtype,
) -> None:
    ops = build_ops(backend, device, storage, 1, native_cache)
    assert ops.activation_dtype == activations
    if backend == "reference":
        assert ops.backends["linear"] == Backend("reference")


def test_every_operation_is_named() -> None:
    known = {field.name for field in dataclasses.fields(Ops)}
    optional = {"pack_layer", "decoder_layers", "enter_head"}
    optional |= {"start_rows", "pack_nodes", "settle", "pack_entries"}
    assert known == {
        *(*OPERATIONS, *optional),
        *("pack_linear", "reads", "stacks_experts", "activation_dtype", "backends"),
    }
    assert len(set(BACKENDS)) == len(BACKENDS)
