"""A group of one rank on one GPU: NCCL starts, every collective leaves a tensor unchanged, and all
can be captured in a CUDA graph. Symmetric memory needs several GPUs and is not checked here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.parallel.distributed import DistributedGroup
from engine.step.group import TPGroup

SIZES = (1024, 64 * 1024, 256 * 1024, 1 << 20)  # bytes
WIDTH = 64
TIMEOUT = 60.0

Collective = Callable[[Tensor], Tensor]


def one_rank() -> dict[str, Any]:
    """Check that the collectives of a group of one change nothing, eagerly and from a graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory() as folder:
        group = DistributedGroup.join(Path(folder) / "store", 0, 1, device, TIMEOUT)
        try:
            found = changes(collectives(group), device)
        finally:
            group.close()
    return {"sizes": list(SIZES), "backend": group.backend, "failed": found}


def collectives(group: TPGroup) -> Mapping[str, Collective]:
    """Every collective, with a result of the shape of its input."""
    return {
        "all_reduce": group.all_reduce,
        "stack": lambda x: group.stack(x)[0],
        "to_owners": lambda x: group.to_owners(x, [len(x)]),
        "from_first": group.from_first,
    }


def changes(operations: Mapping[str, Collective], device: torch.device) -> list[str]:
    """The operations and sizes that do not return their input unchanged."""
    failed = []
    for size in SIZES:
        x = torch.randn(size // 2 // WIDTH, WIDTH, device=device).to(torch.bfloat16)
        for name, operation in operations.items():
            if not torch.equal(operation(x.clone()), x):
                failed.append(f"{name}, {size} bytes: another tensor")
            if device.type == "cuda" and not torch.equal(_from_graph(operation, x), x):
                failed.append(f"{name}, {size} bytes: another tensor from a CUDA graph")
    return failed


def _from_graph(operation: Collective, x: Tensor) -> Tensor:
    """The result of a replay, with an input written after the capture."""
    graph, buffer = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    operation(buffer.clone())  # allocates workspaces before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        total = operation(buffer.clone())
    buffer.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    return total
