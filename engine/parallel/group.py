"""The ranks that share one target. Collectives appear in the layers' forward, nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TPGroup:
    """A tensor-parallel group. One rank today: its collectives are the identity."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, same shape."""
        assert self.size == 1, "groups of several ranks are built by the parallel launcher"
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the last dimension of all ranks."""
        assert self.size == 1, "groups of several ranks are built by the parallel launcher"
        return x
