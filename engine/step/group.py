"""The ranks that share one target. Collectives are explicit calls, never hidden in a hook."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class TPGroup:
    """A tensor-parallel group of one rank: its collectives are the identity, at no cost.

    `DistributedGroup` has several ranks. All ranks must call the same collectives in the same order
    with tensors of the same shape and dtype, unless stated otherwise.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, same shape. `x` may be overwritten."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate the last dimension of all ranks."""
        if self.size == 1:
            return x
        return self.stack(x).movedim(0, -2).flatten(-2)

    def stack(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, [ranks, *x.shape]."""
        return x[None]

    def to_owners(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Swap columns for rows: every rank has some columns of all rows, and gets all columns of
        its own rows.

        Args:
            x: [R, W] this rank's columns.
            counts: how many of the rows, in order, belong to each rank; adds up to R.

        Returns:
            [counts[rank], ranks * W].
        """
        assert list(counts) == [len(x)]
        return x

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank. `x` may be overwritten."""
        return x

    def close(self) -> None:
        """Free resources; no collective may be called afterwards."""
