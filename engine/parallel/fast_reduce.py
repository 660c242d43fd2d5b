"""All-reduce of decode-size tensors over NVLink, through torch's symmetric memory.

Every rank reads all data of the others (one-shot), or reads a share, sums it and reads the others'
sums (two-shot), or lets the NVLink switch sum (multimem). Each is one kernel, takes a few
microseconds and works inside CUDA graphs. NCCL sums all other tensors. This file has never run on
several GPUs: it was written against the operations that torch 2.13 declares.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

MAX_BYTES = 256 * 1024
ONE_SHOT_BYTES = 64 * 1024  # above, reading all data of all ranks costs more than two rounds
ALIGNMENT = 16  # bytes that one thread reads at once
NCCL, ONE_SHOT, TWO_SHOT, MULTIMEM = "nccl", "one-shot", "two-shot", "multimem"
DTYPES = (torch.bfloat16, torch.float32)

logger = logging.getLogger(__name__)


def choose(num_bytes: int, size: int, *, multicast: bool) -> str:
    """How `size` ranks sum tensors of `num_bytes`."""
    if num_bytes == 0 or num_bytes > MAX_BYTES or num_bytes % ALIGNMENT:
        return NCCL
    if multicast:
        return MULTIMEM
    if num_bytes <= ONE_SHOT_BYTES:
        return ONE_SHOT
    return TWO_SHOT if num_bytes % (ALIGNMENT * size) == 0 else NCCL


class SmallAllReduce:
    """Sums tensors over the ranks of an NCCL group of at least two. One stream at a time."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._name = group.group_name
        self._size = group.size()
        self._is_first = group.rank() == 0
        self._chosen: dict[int, str] = {}  # bytes -> how
        self._multicast = False
        self._buffers = self._share(group)

    def fits(self, x: Tensor) -> bool:
        """Whether `x` is summed here rather than by NCCL. Logs the choice for each size once."""
        return x.dtype in self._buffers and self._how(x) != NCCL

    def __call__(self, x: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor of the shape of `x`, which must fit."""
        how, ops = self._how(x), torch.ops.symm_mem
        total: Tensor
        shared = self._buffers[x.dtype][: x.numel()]
        if how == ONE_SHOT:
            total = ops.one_shot_all_reduce_copy(shared, x.flatten(), "sum", self._name)
        else:
            shared.copy_(x.flatten())
            if how == MULTIMEM:
                total = ops.multimem_one_shot_all_reduce(shared, "sum", self._name)
            else:
                total = ops.two_shot_all_reduce_out(
                    shared, "sum", self._name, torch.empty_like(shared)
                )
        return total.view(x.shape)

    def _how(self, x: Tensor) -> str:
        how = self._chosen.get(x.nbytes)
        if how is None:
            how = choose(x.nbytes, self._size, multicast=self._multicast)
            self._chosen[x.nbytes] = how
            if self._is_first:
                logger.info("all-reduce of %d bytes: %s", x.nbytes, how)
        return how

    def _share(self, group: dist.ProcessGroup) -> dict[torch.dtype, Tensor]:
        """A buffer per dtype that all ranks can access; no buffers on any rank if one fails."""
        import torch.distributed._symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        buffers = {}
        works = torch.ones(1, device=device)
        try:
            for dtype in DTYPES:
                shared = symmetric.empty(MAX_BYTES // dtype.itemsize, dtype=dtype, device=device)
                self._multicast = symmetric.rendezvous(shared, group).multicast_ptr != 0
                buffers[dtype] = shared
        except RuntimeError as error:
            logger.warning("no symmetric memory, NCCL sums tensors of all sizes: %s", error)
            works.zero_()
        group.allreduce([works], dist.ReduceOp.MIN).wait()
        return buffers if bool(works) else {}
