"""Groups of processes on one machine, through torch.distributed: gloo for host tensors, NCCL for
GPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from engine.parallel.fast_reduce import SmallAllReduce
from engine.step.group import TPGroup

LOOPBACK = "lo"  # the only network interface that gloo listens on


class DistributedGroup(TPGroup):
    """One rank of several. Not thread-safe: only one thread may call collectives.

    When another rank dies, collectives of host tensors raise RuntimeError; those of GPU tensors
    may hang.
    """

    def __init__(self, host: dist.ProcessGroup, device: dist.ProcessGroup | None) -> None:
        super().__init__(host.rank(), host.size())
        self._host = host
        self._device = device
        # Symmetric memory needs at least two ranks.
        self._small = None
        if device is not None and self.size > 1:
            self._small = SmallAllReduce(device)

    @classmethod
    def join(
        cls, store: Path, rank: int, size: int, device: torch.device, timeout: float
    ) -> DistributedGroup:
        """Join the other ranks through the file `store`, in a folder that only this user can
        enter. Blocks until all have joined. `timeout`: seconds that gloo waits for the others."""
        meeting = FileStore(str(store), size)
        host = _gloo(PrefixStore("host", meeting), rank, size, timeout)
        nccl = _nccl(meeting, rank, size, device) if device.type == "cuda" else None
        group = cls(host, nccl)
        group.stack(torch.zeros(1))  # after this, no rank reads the store any more
        return group

    @property
    def backend(self) -> str:
        """What carries the layers' collectives."""
        return "gloo" if self._device is None else "nccl"

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        if not x.is_cuda:
            return self._sum_in_order(x)
        if self._small is not None and self._small.fits(x):
            return self._small(x)
        x = x.contiguous()
        if x.numel():
            self._of(x).allreduce([x]).wait()
        return x

    def _sum_in_order(self, x: Tensor) -> Tensor:
        """Sum in order of ranks for every element. Gloo's own order depends on where an element
        lies in the tensor, so a token's bits would depend on the other tokens of the batch."""
        total, *others = self.stack(x).unbind()
        for other in others:
            total += other
        return total

    def stack(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.size, *x.shape))
        if x.numel():
            self._of(x)._allgather_base(out.flatten(), x.contiguous().flatten()).wait()
        return out

    def to_owners(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        mine, width = counts[self.rank], x.shape[1]
        out = x.new_empty(self.size * mine, width)
        splits = [mine] * self.size, list(counts)
        self._of(x).alltoall_base(out, x.contiguous(), *splits).wait()
        return out.view(self.size, mine, width).transpose(0, 1).reshape(mine, self.size * width)

    def from_first(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._of(x).broadcast(x, 0).wait()
        return x

    def close(self) -> None:
        if self._device is not None:
            dist.destroy_process_group()

    def _of(self, x: Tensor) -> dist.ProcessGroup:
        if not x.is_cuda:
            return self._host
        assert self._device is not None, "a tensor on a GPU, but the ranks share none"
        return self._device


def _gloo(store: Store, rank: int, size: int, timeout: float) -> dist.ProcessGroup:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=LOOPBACK)]
    options._timeout = timedelta(seconds=timeout)
    # A bare backend has the collectives of a group but no global state, so that several engines in
    # one process do not interfere.
    group: dist.ProcessGroup = gloo(store, rank, size, options)
    return group


def _nccl(store: Store, rank: int, size: int, device: torch.device) -> dist.ProcessGroup:
    dist.init_process_group(
        "nccl",
        store=PrefixStore("device", store),
        rank=rank,
        world_size=size,
        device_id=device,
    )
    group = dist.group.WORLD
    assert group is not None
    return group
