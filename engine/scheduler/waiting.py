"""Sequences that wait to run, and whose turn it is."""

from __future__ import annotations

import bisect
import heapq

from engine.request import Rank, Sequence


class _Lane:
    """The waiting sequences of one client, by rank. A removed one is forgotten at once; its rank
    stays in the heap until most ranks there are such."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.waiting: dict[Rank, Sequence] = {}
        self._heap: list[Rank] = []

    @property
    def num_ranks(self) -> int:
        return len(self._heap)

    @property
    def first(self) -> Rank:
        """The rank of the most important one. There must be one."""
        while self._heap[0] not in self.waiting:
            heapq.heappop(self._heap)
        return self._heap[0]

    def push(self, seq: Sequence) -> None:
        heapq.heappush(self._heap, seq.rank)
        self.waiting[seq.rank] = seq

    def remove(self, rank: Rank) -> None:
        del self.waiting[rank]
        if len(self._heap) > 2 * len(self.waiting) + 8:
            self._heap = sorted(self.waiting)


class WaitingQueue:
    """The smallest priority comes first; among its clients, the one that was served least; of those
    served alike, the one that was charged longest ago; of that client, the smallest rank.

    `charge` says what a client was served. A client that comes while others wait begins as though
    it had been served as much as the least served of them, or as the last that waited: nobody saves
    up turns while away (arXiv:2401.00588). Unless it was charged later, it comes before that one,
    whose prompt was charged in full when it started and may still take long.
    """

    def __init__(self) -> None:
        self._lanes: dict[int, dict[str, _Lane]] = {}  # by priority, then by client
        self._priorities: list[int] = []  # of `_lanes`, ascending
        self._served: dict[str, int] = {}  # by client
        self._charged: dict[str, int] = {}  # by client: number of its newest charge
        self._num_charges = 0
        self._num_waiting: dict[str, int] = {}  # by client, without zeros
        self._served_last = 0  # what the client was served that was the last to wait
        self._length = 0
        self._next: Sequence | None = None  # once chosen, it keeps its turn

    def __len__(self) -> int:
        return self._length

    def __contains__(self, seq: Sequence) -> bool:
        lane = self._lanes.get(seq.rank[0], {}).get(seq.request.client)
        return lane is not None and lane.waiting.get(seq.rank) is seq

    @property
    def num_ranks(self) -> int:
        """Entries of all heaps."""
        return sum(lane.num_ranks for lanes in self._lanes.values() for lane in lanes.values())

    @property
    def best_priority(self) -> int | None:
        """The smallest priority of a waiting sequence, None if none waits."""
        return self._priorities[0] if self._priorities else None

    def charge(self, client: str, amount: int) -> None:
        """Note work done for a client."""
        self._served[client] = self._served.get(client, 0) + amount
        self._num_charges += 1
        self._charged[client] = self._num_charges

    def push(self, seq: Sequence) -> None:
        priority, client = seq.rank[0], seq.request.client
        if client not in self._num_waiting:
            self._serve_like_others(client)
        if priority not in self._lanes:
            bisect.insort(self._priorities, priority)
        lanes = self._lanes.setdefault(priority, {})
        lanes.setdefault(client, _Lane(client)).push(seq)
        self._num_waiting[client] = self._num_waiting.get(client, 0) + 1
        self._length += 1
        if self._next is not None and self._comes_before(seq, self._next):
            self._next = None

    def remove(self, seq: Sequence) -> None:
        priority, client = seq.rank[0], seq.request.client
        lanes = self._lanes[priority]
        lane = lanes[client]
        lane.remove(seq.rank)
        if not lane.waiting:
            del lanes[client]
        if not lanes:
            del self._lanes[priority]
            self._priorities.remove(priority)
        self._num_waiting[client] -= 1
        if not self._num_waiting[client]:
            del self._num_waiting[client]
        self._length -= 1
        if not self._length:
            self._served_last = self._served.get(client, 0)
        if self._next is seq:
            self._next = None

    def peek(self) -> Sequence | None:
        """The sequence whose turn it is, None if none waits. It stays the same until it is removed
        or a more important one of its client or one with a smaller priority comes."""
        if self._next is None and self._length:
            lanes = self._lanes[self._priorities[0]].values()
            lane = min(lanes, key=self._turn)
            self._next = lane.waiting[lane.first]
        return self._next

    def pop(self) -> Sequence:
        seq = self.peek()
        assert seq is not None
        self.remove(seq)
        return seq

    def _turn(self, lane: _Lane) -> tuple[int, int, Rank]:
        """Smaller is sooner, among the clients of a priority."""
        client = lane.client
        return self._served.get(client, 0), self._charged.get(client, 0), lane.first

    @staticmethod
    def _comes_before(seq: Sequence, chosen: Sequence) -> bool:
        """Whether a new sequence takes the turn of one that has been chosen. Another client's does
        not for having been served less, or two that both lack blocks would take turns in vain."""
        same = seq.rank[0] == chosen.rank[0] and seq.request.client == chosen.request.client
        return seq.rank[0] < chosen.rank[0] or (same and seq.rank < chosen.rank)

    def _serve_like_others(self, client: str) -> None:
        others = (self._served.get(other, 0) for other in self._num_waiting)
        least = min(others, default=self._served_last)
        self._served[client] = max(self._served.get(client, 0), least)
