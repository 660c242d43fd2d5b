"""The order of waiting sequences."""

from __future__ import annotations

import pytest

from engine.request import Rank, Sequence
from engine.scheduler.waiting import WaitingQueue
from tests.support.engines.fake_executor import request


def waiting(name: str, rank: Rank, client: str = "") -> Sequence:
    seq = Sequence.from_request(request(name, [1], client=client))
    seq.rank = rank
    return seq


def queue_of(*sequences: Sequence) -> WaitingQueue:
    queue = WaitingQueue()
    for seq in sequences:
        queue.push(seq)
    return queue


def order(queue: WaitingQueue) -> list[str]:
    return [queue.pop().request_id for _ in range(len(queue))]


def test_the_smallest_rank_comes_first() -> None:
    ranks: list[Rank] = [(1, 1, 1), (0, 2, 2), (0, 1, 4), (0, 1, 3), (-1, 9, 5)]
    queue = queue_of(*(waiting(str(rank), rank) for rank in ranks))
    assert queue.best_priority == -1
    assert order(queue) == [str(rank) for rank in sorted(ranks)]
    assert queue.peek() is None
    assert queue.best_priority is None


def test_a_removed_sequence_is_neither_counted_nor_seen() -> None:
    first, second = waiting("a", (0, 0, 1)), waiting("b", (0, 0, 2))
    queue = queue_of(first, second)
    queue.remove(first)
    assert (len(queue), first in queue, second in queue) == (1, False, True)
    assert queue.peek() is second


@pytest.mark.parametrize("kept", [0, 9_999])
def test_removed_sequences_leave_nothing_in_the_queue(kept: int) -> None:
    sequences = [waiting(f"{n}", (n % 3, n, n), f"client {n % 2}") for n in range(10_000)]
    queue = queue_of(*sequences)
    for seq in sequences[:kept] + sequences[kept + 1 :]:
        queue.remove(seq)
    assert len(queue) == 1
    assert queue.num_ranks <= 10
    assert order(queue) == [f"{kept}"]
    assert queue.num_ranks == 0


def test_an_id_that_comes_again_waits_in_its_new_place() -> None:
    old, other = waiting("a", (0, 0, 1)), waiting("b", (1, 0, 2))
    queue = queue_of(old, other)
    queue.remove(old)
    new = waiting("a", (2, 0, 3))
    queue.push(new)
    assert old not in queue
    assert [queue.pop() for _ in range(2)] == [other, new]


def test_a_sequence_may_come_back_with_the_rank_it_had() -> None:
    queue, seq = WaitingQueue(), waiting("a", (0, 0, 1))
    for _ in range(2):
        queue.push(seq)
        assert queue.pop() is seq
    assert queue.peek() is None


@pytest.mark.parametrize(
    ("rank", "client", "takes_it"),
    [
        ((1, 1, 1), "y", False),
        ((1, 9, 9), "x", False),
        ((1, 1, 1), "x", True),  # it was preempted
        ((0, 9, 9), "y", True),
    ],
)
def test_the_next_one_keeps_its_turn(rank: Rank, client: str, takes_it: bool) -> None:
    queue = queue_of(waiting("a", (1, 5, 5), "x"))
    assert queue.peek() is not None
    queue.push(waiting("b", (1, 6, 6), "y"))
    queue.charge("x", 1000)
    queue.charge("y", 2000)
    queue.push(waiting("new", rank, client))
    assert order(queue)[0] == ("new" if takes_it else "a")


def test_the_client_that_was_served_least_is_next() -> None:
    many = [waiting(f"x{n}", (0, n, n), "x") for n in range(6)]
    queue = queue_of(*many)
    served = []
    for number in range(9):
        if number == 2:
            for late in range(3):
                queue.push(waiting(f"y{late}", (0, 10 + late, 10 + late), "y"))
        seq = queue.pop()
        served.append(seq.request_id)
        queue.charge(seq.request.client, 10)
    assert served == ["x0", "x1", "y0", "x2", "y1", "x3", "y2", "x4", "x5"]


def test_of_clients_served_alike_the_one_charged_longest_ago_is_next() -> None:
    queue = queue_of(*(waiting(f"x{n}", (0, n, n), "x") for n in range(2)))
    queue.charge(queue.pop().request.client, 4000)
    queue.push(waiting("y0", (0, 5, 5), "y"))  # new: it begins with the 4000 of x
    queue.push(waiting("z0", (0, 6, 6), "z"))
    assert order(queue) == ["y0", "z0", "x1"]


def test_a_client_does_not_save_up_turns_while_it_is_away() -> None:
    queue = WaitingQueue()
    for number in range(5):  # x comes and goes alone
        queue.push(waiting(f"{number}", (0, number, number), "x"))
        queue.charge(queue.pop().request.client, 1000)
    for number in range(10, 14):
        queue.push(waiting(f"{'xy'[number % 2]}{number}", (0, number, number), "xy"[number % 2]))
    served = []
    while len(queue):
        seq = queue.pop()
        served.append(seq.request.client)
        queue.charge(seq.request.client, 1000)
    assert served in (["y", "x", "y", "x"], ["x", "y", "x", "y"])
