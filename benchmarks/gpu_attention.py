"""Attention of decode rows and trees on a CUDA device with several tunings of
`kernels.attention.triton_plan`: which steps, parts and pipelines are fastest.

    python -m benchmarks.gpu_attention                # what ran on an H200 first, and the default
    python -m benchmarks.gpu_attention --all          # all tunings
    python -m benchmarks.gpu_attention --compile 0 4  # a quarter of the cases, untimed

Prints one case and tuning a line: microseconds, and the largest difference from the first tuning.
A tuning that cuts a case as an earlier one did is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.device_timing import Timer, graph_seconds
from benchmarks.kernel_cases import BLOCK, HEADS, KV_HEADS, TREE, D
from engine.step.shape import ancestors_of, signed
from kernels.attention.triton_kernel import attention, plans_of
from kernels.attention.triton_plan import DEFAULT, SHORT_STEPS, TUNINGS, Tuning
from kernels.ops import UNSCALED, AttentionMeta


class Case(NamedTuple):
    """Equal rows, in tables that have room for more positions than they use."""

    rows: int
    nodes: int
    keys: int
    longest: int  # positions that the tables have room for


CASES = (
    *(Case(rows, 1, 300, 8192) for rows in (1, 4, 16, 64)),
    *(Case(rows, 1, 8192, 8192) for rows in (1, 4, 16, 64)),
    *(Case(1, nodes, keys, 8192) for nodes in (8, 16) for keys in (300, 8192)),
    Case(1, 1, 131072, 131072),
)


def metadata(case: Case, device: torch.device) -> tuple[AttentionMeta, int]:
    """Rows of equal trees over shuffled blocks; and the number of blocks."""
    rows, nodes, keys, longest = case
    per_row = -(-(keys + nodes) // BLOCK)
    tables = torch.zeros(rows, -(-(longest + nodes) // BLOCK), dtype=torch.int32, device=device)
    tables[:, :per_row] = torch.randperm(rows * per_row, device=device).view(rows, per_row)
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


def inputs(case: Case, blocks: int, device: torch.device) -> tuple[Tensor, ...]:
    shape = (blocks, BLOCK, KV_HEADS, D)
    pages = [torch.randn(shape, device=device).bfloat16() for _ in range(2)]
    return torch.randn(case.rows * case.nodes, HEADS, D, device=device).bfloat16(), *pages


def measured(
    cases: Sequence[Case], tunings: Mapping[str, Tuning], device: torch.device, timer: Timer
) -> Iterator[dict[str, Any]]:
    for case in cases:
        meta, blocks = metadata(case, device)
        q, k, v = inputs(case, blocks, device)
        seen, first = [], None
        for name, tuning in tunings.items():
            plans = plans_of(q, k, meta, tuning)
            if plans in seen:
                continue
            seen.append(plans)
            found = {"case": list(case), "tuning": name}

            def run(tuning: Tuning = tuning) -> Tensor:
                return attention(q, k, v, meta, D**-0.5, UNSCALED, tuning)  # noqa: B023

            try:
                got = run()
                first = got if first is None else first
                error = float((got.float() - first.float()).abs().max())
                us = round(timer(run) * 1e6, 2)
            except Exception as problem:  # noqa: BLE001  (one tuning's failure hides no other)
                yield found | {"error": str(problem)[:100]}
                continue
            yield found | {"us": us, "differs": error}


def once(run: Callable[[], object]) -> float:
    """A timer that runs once without timing."""
    run()
    torch.cuda.synchronize()
    return 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_attention")
    parser.add_argument("--compile", nargs=2, type=int, metavar=("PART", "OF"))
    parser.add_argument("--all", action="store_true", help="all tunings")
    given = parser.parse_args(arguments)
    first, step = given.compile or (0, 1)
    two = {SHORT_STEPS.name: SHORT_STEPS, DEFAULT.name: DEFAULT}
    timer = graph_seconds if given.compile is None else once
    tunings = TUNINGS if given.all else two
    for found in measured(CASES[first::step], tunings, torch.device("cuda"), timer):
        if given.compile is None or "error" in found:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
