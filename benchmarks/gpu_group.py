"""A group of one rank on one GPU: NCCL and symmetric memory can be had, sum right, and go into a
CUDA graph. How fast they are between GPUs, only several can say."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.parallel.distributed import DistributedGroup

SIZES = (1024, 64 * 1024, 256 * 1024, 1 << 20)  # bytes: one-shot, its limit, two-shot, NCCL
TIMEOUT = 60.0


def one_rank() -> dict[str, Any]:
    """Whether sums of all sizes come out right, eagerly and from a graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory() as folder:
        group = DistributedGroup.join(Path(folder) / "store", 0, 1, device, TIMEOUT)
        try:
            return sums(group.all_reduce, device) | {"backend": group.backend}
        finally:
            group.close()


def sums(all_reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, Any]:
    """Failures of a reduction over one rank, which must leave every tensor as it is."""
    failed = []
    for size in SIZES:
        x = torch.randn(size // 2, device=device, dtype=torch.bfloat16)
        if not torch.equal(all_reduce(x.clone()), x):
            failed.append(f"{size} bytes: another sum")
        if device.type == "cuda" and not torch.equal(_from_graph(all_reduce, x), x):
            failed.append(f"{size} bytes: another sum from a CUDA graph")
    return {"sizes": list(SIZES), "failed": failed}


def _from_graph(all_reduce: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    graph, buffer = torch.cuda.CUDAGraph(), x.clone()
    all_reduce(buffer.clone())  # workspaces are made before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        total = all_reduce(buffer.clone())
    buffer.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    return total
