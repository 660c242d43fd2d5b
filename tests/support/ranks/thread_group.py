"""Ranks as threads of this process, to test layers of several ranks without other processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from engine.step.group import TPGroup
from tests.support.waiting import DEADLINE

T = TypeVar("T")


class Meeting:
    """Where the ranks of one group exchange tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=DEADLINE)
        self.table: list[Tensor | None] = [None] * size


class ThreadGroup(TPGroup):
    """A rank's view of a meeting. Ranks must call the same collectives with the same shapes."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        super().__init__(rank, meeting.size)
        self._meeting = meeting
        self.num_collectives = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.stack(x).sum(0)

    def stack(self, x: Tensor) -> Tensor:
        found = self._exchange(x)
        assert {(each.shape, each.dtype) for each in found} == {(x.shape, x.dtype)}
        return torch.stack(found)

    def to_owners(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        first = sum(counts[: self.rank])
        whole = torch.cat(self._exchange(x), dim=-1)
        return whole[first : first + counts[self.rank]]

    def from_first(self, x: Tensor) -> Tensor:
        return self._exchange(x)[0]

    def _exchange(self, x: Tensor) -> list[Tensor]:
        meeting = self._meeting
        self.num_collectives += 1
        meeting.table[self.rank] = x
        meeting.barrier.wait()
        found = [each.clone() for each in meeting.table if each is not None]
        meeting.barrier.wait()
        assert len(found) == self.size
        return found


def run_ranks(size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """The results of `work` on each rank. The first failure of a rank is raised; the other ranks
    then stop waiting."""
    meeting = Meeting(size)

    def guarded(rank: int) -> T:
        try:
            return work(ThreadGroup(meeting, rank))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(guarded, rank) for rank in range(size)]
    failures = [error for each in running if (error := each.exception()) is not None]
    for error in failures:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [each.result() for each in running]
