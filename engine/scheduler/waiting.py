"""Sequences that wait to run, most important first."""

from __future__ import annotations

import heapq

from engine.request import Sequence

Rank = tuple[int, float, int]


class WaitingQueue:
    """Ordered by priority, then arrival, then submission. `peek` drops removed entries."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Sequence]] = []
        self._waiting: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, seq: Sequence) -> bool:
        return self._waiting.get(seq.request_id) is seq

    def push(self, rank: Rank, seq: Sequence) -> None:
        self._waiting[seq.request_id] = seq
        heapq.heappush(self._heap, (rank, seq))

    def remove(self, seq: Sequence) -> None:
        del self._waiting[seq.request_id]

    def peek(self) -> Sequence | None:
        """The most important waiting sequence, None if none waits."""
        while self._heap and self._heap[0][1] not in self:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        seq = self.peek()
        assert seq is not None
        heapq.heappop(self._heap)
        del self._waiting[seq.request_id]
        return seq
