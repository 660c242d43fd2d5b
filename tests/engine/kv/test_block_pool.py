"""Blocks: their holders, the order of the free list, and the faults that the audit sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import integers

from engine.kv.block_pool import BlockPool


def emptied(pool: BlockPool) -> list[int]:
    """Take every free block, in the order in which the pool gives them out."""
    return [pool.take() for _ in range(pool.num_free)]


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks is 0; at least 1"):
        BlockPool(0)


def test_the_block_that_was_free_for_longest_goes_first() -> None:
    pool = BlockPool(4)
    assert emptied(pool) == [0, 1, 2, 3]
    for block_id in (2, 0, 3):
        pool.give_back(block_id)
    assert emptied(pool) == [2, 0, 3]


def test_a_shared_block_goes_to_the_end_of_the_queue_when_it_is_free_again() -> None:
    pool = BlockPool(3)
    for block_id in emptied(pool):
        pool.publish(block_id, bytes([block_id]))
        pool.give_back(block_id)
    assert pool.share(bytes([0])) == 0
    pool.give_back(0)
    assert emptied(pool) == [1, 2, 0]


def test_content_is_found_while_held_and_while_free_until_the_block_is_taken() -> None:
    pool = BlockPool(1)
    block_id = pool.take()
    assert pool.share(b"x") is None
    pool.publish(block_id, b"x")
    assert pool.share(b"x") == block_id
    assert pool.count_free([b"x"]) == 0
    for _ in range(2):
        pool.give_back(block_id)
    assert pool.count_free([b"x"]) == 1
    assert pool.share(b"x") == block_id
    pool.give_back(block_id)
    assert pool.take() == block_id
    assert not pool.contains(b"x")
    assert pool.share(b"x") is None


def test_a_block_is_free_only_after_its_last_holder_left() -> None:
    pool = BlockPool(2)
    block_id = pool.take()
    pool.publish(block_id, b"x")
    pool.share(b"x")
    pool.give_back(block_id)
    assert pool.num_free == 1
    pool.audit({block_id: 1})
    pool.give_back(block_id)
    assert pool.num_free == 2
    pool.audit({})


def test_content_that_is_known_stays_where_it_is() -> None:
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.publish(first, b"x")
    pool.publish(second, b"x")
    assert pool.share(b"x") == first
    pool.give_back(second)
    assert pool.take() == second  # its content stays with the other block
    assert pool.contains(b"x")


def test_a_block_given_back_too_often_is_an_error() -> None:
    pool = BlockPool(1)
    pool.give_back(pool.take())
    with pytest.raises(AssertionError, match="block 0 is free already"):
        pool.give_back(0)


def count_one_holder_more(pool: BlockPool) -> None:
    pool._blocks[0].ref_count += 1


def count_one_free_block_more(pool: BlockPool) -> None:
    pool._num_free += 1


def lose_a_free_block(pool: BlockPool) -> None:
    pool._unlink(pool._blocks[2])


def free_a_held_block(pool: BlockPool) -> None:
    pool._append_free(pool._blocks[0])


def forget_half_of_a_content(pool: BlockPool) -> None:
    del pool._by_content[b"x"]


def find_another_block_by_a_content(pool: BlockPool) -> None:
    pool._by_content[b"x"] = pool._blocks[1]


def find_a_block_by_a_second_content(pool: BlockPool) -> None:
    pool._by_content[b"y"] = pool._blocks[0]


def free_list_in_a_circle(pool: BlockPool) -> None:
    pool._blocks[3].following = pool._blocks[2]


@pytest.mark.parametrize(
    "plant",
    [
        count_one_holder_more,
        count_one_free_block_more,
        lose_a_free_block,
        free_a_held_block,
        forget_half_of_a_content,
        find_another_block_by_a_content,
        find_a_block_by_a_second_content,
        free_list_in_a_circle,
    ],
)
def test_the_audit_sees_a_planted_fault(plant: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(4)
    held = {pool.take(): 1, pool.take(): 1}
    pool.publish(0, b"x")
    pool.audit(held)
    plant(pool)
    with pytest.raises(AssertionError):
        pool.audit(held)


@pytest.mark.parametrize("holders", [{}, {0: 2}, {1: 1}, {0: 1, 1: 1}], ids=str)
def test_the_audit_sees_a_difference_to_the_holders(holders: dict[int, int]) -> None:
    pool = BlockPool(2)
    pool.take()
    with pytest.raises(AssertionError):
        pool.audit(holders)


class PoolModel(RuleBasedStateMachine):
    """Compares the pool with a list: free blocks in order, holders by id, contents by block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(4)
        self.free = [0, 1, 2, 3]
        self.holders: dict[int, int] = {}
        self.contents: dict[int, bytes] = {}

    @precondition(lambda self: self.free)
    @rule()
    def take(self) -> None:
        expected = self.free.pop(0)
        assert self.pool.take() == expected
        self.holders[expected] = 1
        self.contents.pop(expected, None)

    @precondition(lambda self: self.holders)
    @rule(pick=integers(0, 3), name=integers(0, 5))
    def publish(self, pick: int, name: int) -> None:
        block_id = sorted(self.holders)[pick % len(self.holders)]
        content = bytes([name])
        if block_id in self.contents:
            return
        self.pool.publish(block_id, content)
        if content not in self.contents.values():
            self.contents[block_id] = content

    @rule(name=integers(0, 5))
    def share(self, name: int) -> None:
        found = self.pool.share(bytes([name]))
        expected = [at for at, content in self.contents.items() if content == bytes([name])]
        assert found == (expected[0] if expected else None)
        if found is not None:
            self.holders[found] = self.holders.get(found, 0) + 1
            self.free = [block_id for block_id in self.free if block_id != found]

    @precondition(lambda self: self.holders)
    @rule(pick=integers(0, 3))
    def give_back(self, pick: int) -> None:
        block_id = sorted(self.holders)[pick % len(self.holders)]
        self.pool.give_back(block_id)
        self.holders[block_id] -= 1
        if not self.holders[block_id]:
            del self.holders[block_id]
            self.free.append(block_id)

    @invariant()
    def adds_up(self) -> None:
        self.pool.audit(self.holders)
        assert self.pool.num_free == len(self.free)


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(max_examples=60, deadline=None, derandomize=True)
