"""When the Triton kernels are chosen, and that a CPU gets them only in the interpreter."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.drafting import reference
from kernels.ops import Backend
from kernels.registry import DRAFTING_OPERATIONS, OPERATIONS, build_ops, separate_drafting
from tests.architecture.source_tree import ROOT
from tests.kernels import triton_env
from tests.kernels.triton_env import numbers

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BACKENDS = dict.fromkeys(OPERATIONS, Backend("triton")) | {"linear": Backend("cublas")}

needs_triton = pytest.mark.skipif(not triton_env.INSTALLED, reason=triton_env.MISSING)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@needs_triton
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_cuda_device_gets_triton_kernels(
    tmp_path: Path, backend: str, dtype: torch.dtype
) -> None:
    ops = build_ops(backend, GPU, dtype, 1, tmp_path, overlap=False)
    assert (ops.backends, ops.activation_dtype) == (BACKENDS, dtype)
    assert list(tmp_path.iterdir()) == []


@needs_triton
def test_steps_of_a_draft_head_may_be_kernels_of_torch_which_is_said(tmp_path: Path) -> None:
    ops = build_ops("triton", GPU, torch.bfloat16, 1, tmp_path)
    separate = separate_drafting(ops)
    changed = {*DRAFTING_OPERATIONS, "rank_drafts"}
    assert {name for name in OPERATIONS if separate.backends[name] != ops.backends[name]} == changed
    assert all("fused_drafting" in str(separate.backends[name]) for name in changed)
    assert separate.lay_levels is reference.lay_levels
    assert separate.enter_head is None


@needs_triton
def test_a_cpu_outside_the_interpreter_neither_imports_triton_nor_gets_its_kernels() -> None:
    code = """if True:
        import pathlib, sys, torch
        from kernels.registry import build_ops
        cpu, folder = torch.device("cpu"), pathlib.Path("nowhere")
        build_ops("reference", cpu, torch.float32, 1, folder)
        print("triton" in sys.modules)
        try:
            build_ops("triton", cpu, torch.float32, 1, folder)
        except ValueError as error:
            print(error)
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    refusal = "Triton kernels are for CUDA devices, not for cpu"
    expected = ["False", f"kernels.backend 'triton' cannot be used: {refusal}"]
    assert done.stdout.splitlines() == expected


@pytest.mark.skipif(not triton_env.INTERPRETED, reason="Triton compiles in this session")
def test_a_cpu_gets_triton_kernels_in_the_interpreter(tmp_path: Path) -> None:
    assert build_ops("triton", CPU, torch.float32, 1, tmp_path).backends == BACKENDS


@pytest.mark.usefixtures("no_triton")
def test_without_triton_auto_says_so_and_triton_is_refused(tmp_path: Path) -> None:
    ops = build_ops("auto", GPU, torch.bfloat16, 1, tmp_path)
    backend = Backend("reference", "Triton is not installed")
    assert ops.backends == dict.fromkeys(OPERATIONS, backend)
    with pytest.raises(ValueError, match="'triton' cannot be used: Triton is not installed"):
        build_ops("triton", GPU, torch.bfloat16, 1, tmp_path)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_each_table_keeps_addresses_of_its_own(tmp_path: Path) -> None:
    first, second = (build_ops("triton", GPU, torch.float32, 1, tmp_path) for _ in range(2))
    assert first.kv_move is not second.kv_move
    x, weight = numbers(2, 32), numbers(32, seed=1)
    assert torch.equal(first.rms_norm(x, weight, 1e-5), second.rms_norm(x, weight, 1e-5))
