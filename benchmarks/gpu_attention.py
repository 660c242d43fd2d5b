"""Attention of decode rows on a CUDA device, with several plans: which tile sizes, splits and
pipelines are fastest. The plans of `kernels.attention` are the first of each case.

    python -m benchmarks.gpu_attention                # prints microseconds, one case a line
    python -m benchmarks.gpu_attention --compile 0 4  # a quarter of them, untimed
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_timing import Timer, graph_seconds
from benchmarks.kernel_cases import BLOCK, HEADS, KV_HEADS, TREE, D
from engine.step.shape import ancestors_of, signed
from kernels.attention import triton_kernel, triton_plan
from kernels.attention.triton_plan import TilePlan
from kernels.ops import UNSCALED, AttentionMeta, Ops
from kernels.registry import build_ops

# (rows, nodes, keys, positions of the longest row)
CASES = (
    (1, 1, 300, 8192),
    (1, 1, 8192, 8192),
    (1, 8, 300, 8192),
    (1, 16, 8192, 8192),
    (16, 1, 8192, 8192),
    (64, 1, 8192, 8192),
    (64, 1, 300, 8192),
)


def metadata(
    rows: int, nodes: int, keys: int, longest: int, device: torch.device
) -> tuple[AttentionMeta, int]:
    """Rows of equal trees after `keys` positions, over shuffled blocks; and their number."""
    per_row = -(-(keys + nodes) // BLOCK)
    tables = torch.randperm(rows * per_row, device=device).int().view(rows, per_row)
    masks = [signed(mask) if nodes > 1 else 0 for mask in ancestors_of(TREE[:nodes])]
    meta = AttentionMeta(
        cu_q=torch.arange(rows + 1, device=device).int() * nodes,
        prefix_lens=torch.full((rows,), keys, device=device).int(),
        first_keys=torch.zeros(rows, dtype=torch.int32, device=device),
        block_tables=tables,
        ancestors=torch.tensor(masks * rows, device=device),
        max_q=nodes,
        max_context=longest + nodes,
    )
    return meta, rows * per_row


def inputs(rows: int, nodes: int, blocks: int, device: torch.device) -> tuple[Tensor, ...]:
    shape = (blocks, BLOCK, KV_HEADS, D)
    pages = [torch.randn(shape, device=device).bfloat16() for _ in range(2)]
    return torch.randn(rows * nodes, HEADS, D, device=device).bfloat16(), *pages


@contextmanager
def planned(**changes: Any) -> Iterator[None]:
    """Other constants: `processors` of the GPU, `merging` rows, `block_n` keys of a step, and those
    of the kernel's file."""
    processors, merging = changes.pop("processors", None), changes.pop("merging", None)
    block_n, kept_block_n = changes.pop("block_n", None), TilePlan.block_n
    kernel: Any = triton_kernel
    kept = {name: getattr(kernel, name) for name in (*changes, "_num_processors")}
    kept_merging = triton_plan.MERGING_TILE
    for name, value in changes.items():
        setattr(kernel, name, value)
    if processors is not None:
        kernel._num_processors = lambda _device: processors
    if block_n is not None:
        TilePlan.block_n = property(lambda _plan: block_n)  # type: ignore[method-assign, assignment]
    triton_plan.MERGING_TILE = kept_merging if merging is None else merging
    triton_plan.plan_tiles.cache_clear()
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(kernel, name, value)
        TilePlan.block_n = kept_block_n  # type: ignore[method-assign]
        triton_plan.MERGING_TILE = kept_merging
        triton_plan.plan_tiles.cache_clear()


PLANS: dict[str, dict[str, Any]] = {
    "usual": {},
    "merged by a launch": {"merging": 0},
    "merged up to 64 rows": {"merging": 64},
    "half as many, merged up to 64 rows": {"processors": 66, "merging": 64},
    "steps of 64": {"block_n": 64},
    "parts of 64": {"MIN_SPLIT_KEYS": 64},
}


def measured(ops: Ops, device: torch.device, mine: slice, timer: Timer) -> Iterator[dict[str, Any]]:
    every = list(itertools.product(CASES, PLANS.items()))[mine]
    for (rows, nodes, keys, longest), (name, changes) in every:
        found: dict[str, Any] = {"case": [rows, nodes, keys, longest], "plan": name}
        meta, blocks = metadata(rows, nodes, keys, longest, device)
        q, k, v = inputs(rows, nodes, blocks, device)
        with planned(**changes):
            try:
                seconds = timer(lambda: ops.attention(q, k, v, meta, D**-0.5, UNSCALED))  # noqa: B023
            except Exception as error:  # noqa: BLE001  (one plan's failure hides no other)
                yield found | {"error": str(error)[:100]}
                continue
        yield found | {"us": round(seconds * 1e6, 2)}


def once(run: Callable[[], object]) -> float:
    """A timer that runs once without timing."""
    run()
    torch.cuda.synchronize()
    return 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_attention")
    parser.add_argument("--compile", nargs=2, type=int, metavar=("PART", "OF"))
    asked = parser.parse_args(arguments).compile
    device = torch.device("cuda")
    ops = build_ops("triton", device, torch.bfloat16, 1, Path("unused"))
    mine = slice(0, None) if asked is None else slice(asked[0], None, asked[1])
    for found in measured(ops, device, mine, graph_seconds if asked is None else once):
        if asked is None or "error" in found:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
