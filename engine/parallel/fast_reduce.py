"""All-reduce of decode-size tensors over NVLink, through torch's symmetric memory.

Every rank reads all data of the others (one-shot), or reads a share, sums it and reads the others'
sums (two-shot), or lets the NVLink switch sum (multimem). Each is one kernel, takes a few
microseconds and works inside CUDA graphs. NCCL sums all other tensors. This file has never run on
several GPUs: it was written against the operations that torch 2.13 declares.

Sums are accumulated in float32 and rounded to the tensor's type once. The switch does so by itself.
torch's one-shot and two-shot kernels add in the type of their input, rank after rank, so bfloat16
tensors are widened before them: twice the bytes instead of up to `size` - 1 roundings. NCCL rounds
at every step of its ring.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

MAX_BYTES = 256 * 1024
ONE_SHOT_BYTES = 64 * 1024  # above, reading all data of all ranks costs more than two rounds
ALIGNMENT = 16  # bytes that one thread reads at once
NCCL, ONE_SHOT, TWO_SHOT, MULTIMEM = "nccl", "one-shot", "two-shot", "multimem"
DTYPES = (torch.bfloat16, torch.float32)
ACCUMULATED = torch.float32  # the type in which sums are added up

logger = logging.getLogger(__name__)
T = TypeVar("T")


def choose(x: Tensor, size: int, *, multicast: bool) -> str:
    """How `size` ranks sum tensors like `x`."""
    num_bytes = x.nbytes if multicast else x.numel() * ACCUMULATED.itemsize
    if x.dtype not in DTYPES or num_bytes == 0 or num_bytes > MAX_BYTES or num_bytes % ALIGNMENT:
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
        self._chosen: dict[tuple[int, torch.dtype], str] = {}
        self._shared = share(_Symmetric(group), functools.partial(_all_agree, group))

    def fits(self, x: Tensor) -> bool:
        """Whether `x` is summed here rather than by NCCL. Logs the choice for each size once."""
        return bool(self._shared.buffers) and self._how(x) != NCCL

    def __call__(self, x: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor of the shape and type of `x`, which must fit."""
        how, ops = self._how(x), torch.ops.symm_mem
        total: Tensor
        shared = self._shared.buffers[x.dtype if how == MULTIMEM else ACCUMULATED][: x.numel()]
        shared.copy_(x.flatten())
        if how == MULTIMEM:
            total = ops.multimem_one_shot_all_reduce(shared, "sum", self._name)
        elif how == ONE_SHOT:
            total = ops.one_shot_all_reduce(shared, "sum", self._name)
        else:
            total = ops.two_shot_all_reduce_out(shared, "sum", self._name, torch.empty_like(shared))
        return total.to(x.dtype).view(x.shape)

    def _how(self, x: Tensor) -> str:
        how = self._chosen.get((x.numel(), x.dtype))
        if how is None:
            how = choose(x, self._size, multicast=self._shared.multicast)
            self._chosen[x.numel(), x.dtype] = how
            if self._is_first:
                logger.info("all-reduce of %d bytes of %s: %s", x.nbytes, x.dtype, how)
        return how


@dataclass(frozen=True, slots=True)
class Shared:
    """Buffers that all ranks can access, by dtype; none if a rank could not have them."""

    buffers: dict[torch.dtype, Tensor]
    multicast: bool  # whether the switch can sum them, on every rank


class SymmetricMemory(Protocol):
    """Makes buffers that all ranks can access. Both methods raise RuntimeError or ImportError where
    that is not possible."""

    def allocate(self, dtype: torch.dtype) -> Tensor:
        """A buffer of MAX_BYTES on this rank's GPU."""
        ...

    def meet(self, buffer: Tensor) -> bool:
        """Open the buffers of the others: all ranks call it at the same time and wait for each
        other. Returns whether the switch can sum them."""
        ...


def share(memory: SymmetricMemory, all_agree: Callable[[bool], bool]) -> Shared:
    """Buffers for all DTYPES on every rank, or on none. `all_agree` tells whether every rank says
    True. Ranks agree before each meeting, since one that stays away would let the others wait."""
    nothing = Shared({}, multicast=False)
    buffers = _tried(lambda: {dtype: memory.allocate(dtype) for dtype in DTYPES})
    if not all_agree(buffers is not None) or buffers is None:
        return nothing
    multicast = True
    for buffer in buffers.values():
        summed = _tried(functools.partial(memory.meet, buffer))
        if not all_agree(summed is not None):
            return nothing
        multicast = all_agree(bool(summed)) and multicast
    return Shared(buffers, multicast)


def _tried(attempt: Callable[[], T]) -> T | None:
    """None, and a warning, where there is no symmetric memory."""
    try:
        return attempt()
    except (RuntimeError, ImportError) as error:
        logger.warning("no symmetric memory, NCCL sums tensors of all sizes: %s", error)
        return None


@dataclass(frozen=True, slots=True)
class _Symmetric:
    """Implements `SymmetricMemory` with torch."""

    group: dist.ProcessGroup

    def allocate(self, dtype: torch.dtype) -> Tensor:
        import torch.distributed._symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        return symmetric.empty(MAX_BYTES // dtype.itemsize, dtype=dtype, device=device)

    def meet(self, buffer: Tensor) -> bool:
        import torch.distributed._symmetric_memory as symmetric

        return bool(symmetric.rendezvous(buffer, self.group).multicast_ptr != 0)


def _all_agree(group: dist.ProcessGroup, agree: bool) -> bool:
    answer = torch.tensor([int(agree)], device=torch.device("cuda", torch.cuda.current_device()))
    group.allreduce([answer], dist.ReduceOp.MIN).wait()
    return bool(answer)
