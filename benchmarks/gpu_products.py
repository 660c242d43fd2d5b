"""Products of few rows on a CUDA device: cuBLAS against every plan of our kernel, by shape of
Llama-3.1-8B, and rounds with the fastest of them.

    python -m benchmarks.gpu_check --part products --part "8B rounds, products"
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import bars
from benchmarks.bars import Verdict
from benchmarks.gpu_engine import Large
from benchmarks.gpu_rounds import LOADS, Rounds, measured
from benchmarks.kernels import copy_bandwidth
from benchmarks.parts import print_result
from engine.models.products import products as products_of
from kernels.linear.kept_plans import CUBLAS, Shape
from kernels.linear.triton_products import Products, attempt, compile_plans
from kernels.linear.triton_skinny import PLANS
from kernels.ops import LinearWeight
from kernels.registry import build_ops

Found = dict[str, Any]
# Name, inputs, outputs of the operation, gated
SHAPES = (
    ("qkv", 4096, 6144, False),
    ("output", 4096, 4096, False),
    ("gate_up", 4096, 14336, True),
    ("down", 14336, 4096, False),
    ("logits", 4096, 128256, False),
)
ROWS = (1, 4, 8, 16)
NUM_BYTES = 2**29  # of weights that a measurement reads in turn: several times the L2 cache
SPEED = 4.2 / 4.25  # that we ask for, as a share of the copy
CHAIN = "chain3"


def products() -> Found:
    """Microseconds of every product with cuBLAS and with every plan, and the share of a copy's
    speed. A plan that gives wrong results has no time."""
    bandwidth = copy_bandwidth()
    weights = {name: list(_weights(K, N, gated=gated)) for name, K, N, gated in SHAPES}
    shapes = {name: Shape.of(weights[name][0], gated=gated) for name, _, _, gated in SHAPES}
    compile_plans({shapes[name]: own for name, own in weights.items()})
    found: Found = {"copy": bandwidth, "products": {}, "failed": []}
    for name, own in weights.items():
        found["products"][name] = _measured(own, shapes[name], bandwidth)
        if not _is_same_alone(own[0], shapes[name]):
            found["failed"].append(f"{name}: a row alone differs from the same among others")
        found["bars"] = bars.as_json(verdicts(found))
        print_result(found)
    print(table(found))
    return found


def _weights(K: int, N: int, *, gated: bool) -> Iterator[LinearWeight]:
    """As many as take NUM_BYTES, at least one."""
    outputs = 2 * N if gated else N
    for _ in range(max(1, NUM_BYTES // (2 * K * outputs))):
        data = torch.randn(outputs, K, device="cuda", dtype=torch.bfloat16) * 0.02
        yield LinearWeight(data, None, outputs, K)


def _measured(weights: Sequence[LinearWeight], shape: Shape, bandwidth: float) -> Found:
    """By number of rows and plan: microseconds, and share of the copy's speed."""
    floor = 1e6 * weights[0].data.nbytes / bandwidth
    found: Found = {}
    for rows in ROWS:
        x = torch.randn(rows, shape.inputs, device="cuda", dtype=torch.bfloat16)
        for name in (CUBLAS, *(plan.name for plan in PLANS)):
            micros = attempt(name, x, weights, gated=shape.gated)
            share = None if micros is None else round(floor / micros, 3)
            found.setdefault(f"{rows} rows", {})[name] = [micros, share]
    return found


def _is_same_alone(weight: LinearWeight, shape: Shape) -> bool:
    chosen = Products("skinny", weight.data.device, None)
    run = chosen.gated_linear if shape.gated else chosen.linear
    x = torch.randn(16, shape.inputs, device="cuda", dtype=torch.bfloat16)
    together = run(x, weight)
    return all(torch.equal(run(x[: n + 1], weight), together[: n + 1]) for n in (0, 6))


def verdicts(found: Found) -> Iterator[Verdict]:
    """The best plan against cuBLAS and against the copy, at one row."""
    for name, by_rows in found["products"].items():
        one = {plan: micros for plan, (micros, _) in by_rows["1 rows"].items() if micros}
        best = min((micros for plan, micros in one.items() if plan != CUBLAS), default=None)
        floors = [m * s for m, s in by_rows["1 rows"].values() if m]
        for bar, of, at_most in (
            ("cuBLAS", one.get(CUBLAS), 1.0),
            ("the copy's time", max(floors, default=None), 1 / SPEED),
        ):
            ratio = None if best is None or of is None else best / of
            yield Verdict(f"{name}, 1 row, the best plan / {bar}", at_most, ratio)


def table(found: Found) -> str:
    """Microseconds, a line for each shape and number of rows."""
    names = [CUBLAS, *(plan.name for plan in PLANS)]
    lines = [" | ".join(["product", *names])]
    for shape, by_rows in found["products"].items():
        for rows, by_plan in by_rows.items():
            cells = ["-" if by_plan[n][0] is None else f"{by_plan[n][0]:.1f}" for n in names]
            lines.append(" | ".join([f"{shape}, {rows}", *cells]))
    return "\n".join(lines)


def rounds() -> Found:
    """Rounds of the 8B shape at batch 1, without drafts and with a chain of 3, with cuBLAS and with
    the fastest kernels."""
    device = torch.device("cuda")
    found: Found = {"rounds": {}, "failed": []}
    with tempfile.TemporaryDirectory() as folder:
        by_name = {
            wanted: build_ops("triton", device, torch.bfloat16, 1, Path(folder), products=wanted)
            for wanted in ("cublas", "auto")
        }
        large = Large(by_name["cublas"], device, Path(folder))
        target = large.target()
        head = large.head(target)
        chosen = by_name["auto"].products
        assert chosen is not None
        chosen.choose(products_of(target.model, head.head))
        found["chosen"] = {name: str(backend) for name, backend in chosen.backends().items()}
        for load in ("root", CHAIN):
            for wanted, ops in by_name.items():
                running = Rounds(replace(large, ops=ops), target, head)
                shape, each = LOADS[load]
                found["rounds"][f"{load}, {wanted}"] = measured(
                    lambda r=running, s=shape, o=each: r.core(s, o),  # type: ignore[misc]
                    each,
                    profiled=load == "root",
                )
                print_result(found)
    times = {name: round_["device_ms"] for name, round_ in found["rounds"].items()}
    found["bars"] = bars.as_json(
        Verdict(f"{load}: chosen products / cuBLAS", 1.0, times[f"{load}, auto"] / cublas)
        for load, cublas in ((load, times[f"{load}, cublas"]) for load in ("root", CHAIN))
    )
    return found
