"""Which all-reduce is used for which size, in which type it adds, and that ranks agree on it; the
operations themselves need several GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.parallel import fast_reduce
from engine.parallel.fast_reduce import (
    DTYPES,
    MULTIMEM,
    NCCL,
    ONE_SHOT,
    TWO_SHOT,
    Shared,
    SmallAllReduce,
    choose,
    share,
)
from tests.support.ranks.thread_group import ThreadGroup, run_ranks

KIB = 1024


@pytest.mark.parametrize(
    ("num_bytes", "size", "multicast", "expected"),
    [
        (16, 8, False, ONE_SHOT),
        (64 * KIB, 8, False, ONE_SHOT),
        (64 * KIB + 128, 8, False, TWO_SHOT),
        (64 * KIB + 16, 8, False, NCCL),  # does not divide into aligned shares
        (256 * KIB, 8, False, TWO_SHOT),
        (256 * KIB + 128, 8, False, NCCL),
        (24, 2, False, NCCL),  # not aligned
        (0, 2, False, NCCL),
        (16, 8, True, MULTIMEM),
        (256 * KIB, 8, True, MULTIMEM),
        (256 * KIB + 16, 8, True, NCCL),
    ],
)
def test_sizes_are_served_by(num_bytes: int, size: int, multicast: bool, expected: str) -> None:
    x = torch.empty(num_bytes // 4)
    assert choose(x, size, multicast=multicast) == expected
    if not multicast:  # widened to float32, so half of the bytes decide alike
        assert choose(x.bfloat16(), size, multicast=False) == expected


def test_other_types_are_left_to_nccl() -> None:
    assert choose(torch.empty(64, dtype=torch.int64), 8, multicast=True) == NCCL


@dataclass
class PretendedMemory:
    """Fails on one rank at one of its calls; counts the ranks that meet."""

    group: ThreadGroup
    fails_at: int | None
    multicast: bool = True
    calls: int = 0

    def allocate(self, dtype: torch.dtype) -> Tensor:
        self._call()
        return torch.empty(8, dtype=dtype)

    def meet(self, buffer: Tensor) -> bool:
        self.group.stack(torch.zeros(1, dtype=buffer.dtype))  # all ranks must be here
        self._call()
        return self.multicast

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("no such memory here")


@pytest.mark.parametrize("fails_at", [None, 1, 2, 3, 4])
def test_if_one_rank_has_no_shared_memory_no_rank_uses_it(fails_at: int | None) -> None:
    def work(group: ThreadGroup) -> Shared:
        memory = PretendedMemory(group, fails_at if group.rank == 1 else None)
        return share(memory, agreement_of(group))

    found = run_ranks(3, work)
    for shared in found:
        assert list(shared.buffers) == ([] if fails_at else list(DTYPES))
        assert shared.multicast == (fails_at is None)


def test_the_switch_sums_only_if_it_can_for_every_rank() -> None:
    def work(group: ThreadGroup) -> Shared:
        memory = PretendedMemory(group, None, multicast=group.rank != 2)
        return share(memory, agreement_of(group))

    assert [shared.multicast for shared in run_ranks(3, work)] == [False] * 3


def agreement_of(group: ThreadGroup) -> Any:
    return lambda agree: bool(group.stack(torch.tensor([agree])).all())


@pytest.mark.parametrize("multicast", [False, True])
@pytest.mark.parametrize("numel", [64, 32 * KIB])
def test_bfloat16_is_added_up_in_float32(
    monkeypatch: pytest.MonkeyPatch, multicast: bool, numel: int
) -> None:
    """Of 8 ranks: 1, and seven times what bfloat16 would lose beside it. The kernels add in the
    type of their input, except the switch."""
    parts = torch.tensor([1.0] + [2.0**-9] * 7)
    seen: list[torch.dtype] = []

    def added(shared: Tensor, *_: Any) -> Tensor:
        seen.append(shared.dtype)
        kind = torch.float32 if multicast else shared.dtype
        total = torch.zeros_like(shared, dtype=kind)
        for part in parts:
            total += part.to(kind)
        return total.to(shared.dtype)

    class Kernels:
        one_shot_all_reduce = two_shot_all_reduce_out = staticmethod(added)
        multimem_one_shot_all_reduce = staticmethod(added)

    monkeypatch.setattr(torch.ops, "symm_mem", Kernels)
    small = SmallAllReduce.__new__(SmallAllReduce)
    small._name, small._size, small._is_first, small._chosen = "0", 8, False, {}
    buffers = {dtype: torch.empty(fast_reduce.MAX_BYTES // dtype.itemsize) for dtype in DTYPES}
    buffers = {dtype: buffer.to(dtype) for dtype, buffer in buffers.items()}
    small._shared = Shared(buffers, multicast)
    x = torch.ones(numel, dtype=torch.bfloat16)
    assert small.fits(x)
    total = small(x)
    assert total.dtype == torch.bfloat16
    assert total.unique().tolist() == [parts.sum().bfloat16().item()]
    assert seen == [torch.bfloat16 if multicast else torch.float32]
