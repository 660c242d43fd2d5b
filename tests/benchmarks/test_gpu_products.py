"""What the GPU check says of products of few rows."""

from __future__ import annotations

from typing import Any

from tests.kernels import triton_env

gpu_products = triton_env.load("benchmarks.gpu_products")
FIRST, *OTHERS = (plan.name for plan in gpu_products.PLANS)


def one_row(cublas: float | None, first: float | None, floor: float = 8.0) -> dict[str, Any]:
    times = {"cublas": cublas, FIRST: first, **dict.fromkeys(OTHERS)}
    cells = {name: [time, time and floor / time] for name, time in times.items()}
    return {"products": {"qkv": {"1 rows": cells, "8 rows": cells}}}


def test_bars_compare_the_best_plan_with_cublas_and_with_the_copy() -> None:
    found = one_row(cublas=10.0, first=8.0)
    assert {verdict.name: verdict.value for verdict in gpu_products.verdicts(found)} == {
        "qkv, 1 row, the best plan / cuBLAS": 0.8,
        "qkv, 1 row, the best plan / the copy's time": 1.0,
    }
    assert gpu_products.table(found).splitlines()[1].startswith("qkv, 1 rows | 10.0 | 8.0 | -")


def test_a_product_without_times_has_no_values() -> None:
    found = one_row(None, None)
    assert {verdict.value for verdict in gpu_products.verdicts(found)} == {None}
