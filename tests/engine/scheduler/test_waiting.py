"""The order of waiting sequences."""

from __future__ import annotations

from engine.request import Sequence
from engine.scheduler.waiting import Rank, WaitingQueue
from tests.support.fake_executor import request


def waiting(name: str) -> Sequence:
    return Sequence.from_request(request(name, [1]))


def test_the_smallest_rank_comes_first() -> None:
    queue = WaitingQueue()
    ranks: list[Rank] = [(1, 0.0, 1), (0, 2.0, 2), (0, 1.0, 4), (0, 1.0, 3), (-1, 9.0, 5)]
    for rank in ranks:
        queue.push(rank, waiting(str(rank)))
    assert [queue.pop().request_id for _ in ranks] == [str(rank) for rank in sorted(ranks)]
    assert queue.peek() is None
    assert len(queue) == 0


def test_a_removed_sequence_is_neither_counted_nor_seen() -> None:
    queue = WaitingQueue()
    first, second = waiting("a"), waiting("b")
    queue.push((0, 0.0, 1), first)
    queue.push((0, 0.0, 2), second)
    queue.remove(first)
    assert (len(queue), first in queue, second in queue) == (1, False, True)
    assert queue.peek() is second


def test_an_id_that_comes_again_waits_in_its_new_place() -> None:
    queue = WaitingQueue()
    old, other, new = waiting("a"), waiting("b"), waiting("a")
    queue.push((0, 0.0, 1), old)
    queue.push((1, 0.0, 2), other)
    queue.remove(old)
    queue.push((2, 0.0, 3), new)
    assert old not in queue
    assert [queue.pop() for _ in range(2)] == [other, new]


def test_a_sequence_may_come_back_with_the_rank_it_had() -> None:
    queue = WaitingQueue()
    seq = waiting("a")
    for _ in range(2):
        queue.push((0, 0.0, 1), seq)
        assert queue.pop() is seq
    assert queue.peek() is None
