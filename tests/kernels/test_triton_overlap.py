"""Overlapping launches: every kernel waits for its inputs, and only operations built so overlap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.ops import Backend, LinearWeight, Ops
from kernels.registry import OPERATIONS, OVERLAPPING, build_ops
from tests.architecture.source_tree import ROOT
from tests.kernels import triton_env
from tests.kernels.triton_env import numbers

triton_launch = triton_env.load("kernels.triton_launch")
pytestmark = triton_env.MARKS

AWAIT, EARLY = "await_inputs()", "begin_early()"
CONSTANTS = {"weight_ptr"}  # pointers that may be read before the wait: no kernel writes to them


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def kernels() -> dict[str, ast.FunctionDef]:
    """Triton functions that return nothing and that no other Triton function calls."""
    functions: dict[str, ast.FunctionDef] = {}
    called: set[str] = set()
    for path, tree in parsed():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in decorators(node):
                if not any(isinstance(n, ast.Return) and n.value for n in ast.walk(node)):
                    functions[f"{path.parent.name}/{path.stem}.{node.name}"] = node
                called |= {
                    call.func.id
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
    return {name: node for name, node in functions.items() if node.name not in called}


def decorators(node: ast.FunctionDef) -> str:
    return " ".join(ast.unparse(decorator) for decorator in node.decorator_list)


def faults(kernel: ast.FunctionDef) -> list[str]:
    """What a kernel does before it waits that it must not do there."""
    body = kernel.body[1:] if ast.get_docstring(kernel) else kernel.body
    lines = [ast.unparse(statement) for statement in body]
    if lines[0] == AWAIT:
        return []
    if lines[0] != EARLY or AWAIT not in lines:
        return [f"starts with {lines[0]}"]
    wrong = []
    for statement in body[: lines.index(AWAIT)]:
        called = {ast.unparse(n.func) for n in ast.walk(statement) if isinstance(n, ast.Call)}
        pointers = {
            n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id.endswith("_ptr")
        }
        if pointers - CONSTANTS or any("store" in name or "atomic" in name for name in called):
            wrong.append(ast.unparse(statement))
    return wrong


def test_every_kernel_waits_before_it_touches_memory() -> None:
    found = kernels()
    assert len(found) > 30
    assert {name: lines for name, node in found.items() if (lines := faults(node))} == {}


def test_kernels_that_do_not_wait_are_seen() -> None:
    def kernel(*lines: str) -> ast.FunctionDef:
        node = ast.parse("def kernel():\n    " + "\n    ".join(lines)).body[0]
        assert isinstance(node, ast.FunctionDef)
        return node

    assert faults(kernel("row = tl.program_id(0)", AWAIT)) == ["starts with row = tl.program_id(0)"]
    assert faults(kernel(EARLY, "w = tl.load(weight_ptr)")) == [f"starts with {EARLY}"]
    assert faults(kernel(EARLY, "w = tl.load(weight_ptr)", AWAIT)) == []
    assert faults(kernel(EARLY, "x = tl.load(x_ptr)", AWAIT)) == ["x = tl.load(x_ptr)"]
    assert faults(kernel(EARLY, "tl.store(weight_ptr, 0)", AWAIT)) == ["tl.store(weight_ptr, 0)"]


def test_kernels_are_launched_in_one_place_only() -> None:
    names = {node.name for node in kernels().values()}
    launched = {
        f"{path.name}: {ast.unparse(node)}"
        for path, tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and ast.unparse(node.func.value).rpartition(".")[2] in {*names, "kernel"}
    }
    only = "self.kernel[self.grid](**self.arguments, **self.options())"
    assert launched == {f"triton_launch.py: {only}"}


def test_launches_overlap_inside_operations_built_so() -> None:
    launch = triton_launch.Launch("none", None, (1,), {})

    def overlaps() -> bool:
        return launch.options()["launch_pdl"]

    def failing() -> None:
        raise ValueError("failed")

    assert not overlaps()
    assert triton_launch.overlapped(overlaps)()
    with pytest.raises(ValueError, match="failed"):
        triton_launch.overlapped(failing)()
    assert not overlaps()


@pytest.mark.parametrize(
    ("capability", "wanted", "got"),
    [((9, 0), True, True), ((9, 0), False, False), ((8, 9), True, False)],
)
def test_gpus_that_can_overlap_do_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: tuple[int, int],
    wanted: bool,
    got: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ops = build_ops("auto", torch.device("cuda"), torch.float32, 1, tmp_path, overlap=wanted)
    backend = Backend("triton", OVERLAPPING) if got else Backend("triton")
    products = {"linear": Backend("cublas")}
    assert ops.backends == dict.fromkeys(OPERATIONS, backend) | products
    seen = []
    options = triton_launch.Launch.options
    monkeypatch.setattr(
        triton_launch.Launch,
        "options",
        lambda launch: seen.append(options(launch)) or {},
    )
    x, weight = numbers(2, 32), numbers(32, seed=1)
    assert ops.rms_norm(x, weight, 1e-5).isfinite().all()
    assert [found["launch_pdl"] for found in seen] == [got]


@pytest.mark.extended  # ten seconds
def test_the_instructions_are_in_hopper_kernels_only() -> None:
    """Compiled in a process of its own, because this one may interpret."""
    code = """if True:
        import triton
        from triton.backends.compiler import GPUTarget
        from kernels.norm.triton_kernel import launches
        from kernels.triton_launch import SM90, _source
        for target in (SM90, GPUTarget("cuda", 80, 32)):
            launch = launches()[0]
            made = triton.compile(_source(launch), target=target, options=launch.options())
            print(made.asm["ptx"].count("griddepcontrol.wait"))
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]


@pytest.mark.skipif(triton_env.INTERPRETED, reason="only a GPU overlaps kernels")
def test_overlapping_kernels_of_a_graph_compute_the_same_bits(tmp_path: Path) -> None:
    """Among kernels that know nothing of it: fills, additions and products of torch."""
    x, gains = numbers(4, 4096, dtype=torch.bfloat16), numbers(4096, seed=1)
    data = numbers(4096, 4096, seed=2, dtype=torch.bfloat16) / 64
    weight = LinearWeight(data, None, 4096, 4096)

    def stream(ops: Ops) -> torch.Tensor:
        residual, added = torch.zeros_like(x), x
        for step in range(60):
            added = ops.add_rms_norm(added, residual, gains, 1e-5)
            added = ops.linear(added, weight) if step % 3 == 0 else added
            added = added + 1 if step % 7 == 0 else ops.rms_norm(added, gains, 1e-5)
        return residual

    plain, overlapping = (
        build_ops("triton", x.device, torch.bfloat16, 1, tmp_path, overlap=on)
        for on in (False, True)
    )
    expected = stream(plain)
    assert torch.equal(stream(overlapping), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = stream(overlapping)
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
