"""KV cache blocks, their reference counts, and the order in which free ones are taken."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Block:
    """One page of the KV cache. Only the pool changes it."""

    block_id: int
    ref_count: int = 0
    content: bytes | None = None  # chained hash of the tokens it holds, once published
    previous: Block | None = None  # in the free list
    following: Block | None = None


class BlockPool:
    """Reference-counted blocks with an LRU free list.

    A freed block keeps its content and can be shared again until it is taken for other content;
    the block that has been free longest is taken first.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; at least 1 is needed")
        self._blocks = [Block(block_id) for block_id in range(num_blocks)]
        self._by_content: dict[bytes, Block] = {}
        self._head = Block(-1)  # sentinels of the free list
        self._tail = Block(-1)
        self._head.following, self._tail.previous = self._tail, self._head
        self._num_free = 0
        for block in self._blocks:
            self._append_free(block)

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        return self._num_free

    def take(self) -> int:
        """Take the block that has been free longest; its content is forgotten."""
        block = self._head.following
        assert block is not None
        assert block is not self._tail, "the caller checks num_free first"
        self._unlink(block)
        self._forget(block)
        block.ref_count = 1
        return block.block_id

    def share(self, content: bytes) -> int | None:
        """Add a holder to the block with this content; None when no block has it."""
        block = self._by_content.get(content)
        if block is None:
            return None
        if block.ref_count == 0:
            self._unlink(block)
        block.ref_count += 1
        return block.block_id

    def contains(self, content: bytes) -> bool:
        return content in self._by_content

    def count_leading(self, contents: Iterable[bytes]) -> int:
        """How many contents some block has, up to the first that none has."""
        known = self._by_content
        return sum(1 for _ in itertools.takewhile(known.__contains__, contents))

    def count_free(self, contents: Iterable[bytes]) -> int:
        """How many of the blocks with these contents are in the free list (sharing them takes them
        out)."""
        blocks = map(self._by_content.__getitem__, contents)
        return sum(block.ref_count == 0 for block in blocks)

    def publish(self, block_id: int, content: bytes) -> None:
        """Make a fully written block findable, unless another block has the same content."""
        block = self._blocks[block_id]
        assert block.ref_count > 0
        assert block.content is None
        if content not in self._by_content:
            block.content = content
            self._by_content[content] = block

    def forget(self, block_id: int) -> None:
        """Make a block unfindable; its holders keep it."""
        self._forget(self._blocks[block_id])

    def give_back(self, block_id: int) -> None:
        """Remove one holder. Without holders the block is free; its content stays findable."""
        block = self._blocks[block_id]
        assert block.ref_count > 0, f"block {block_id} is free already"
        block.ref_count -= 1
        if block.ref_count == 0:
            self._append_free(block)

    def audit(self, holders: dict[int, int]) -> None:
        """Assert that reference counts equal `holders` and match the free list and contents."""
        free = set()
        block = self._head.following
        while block is not self._tail:
            assert block is not None
            assert block.block_id not in free, f"block {block.block_id} is twice in the free list"
            free.add(block.block_id)
            block = block.following
        assert len(free) == self._num_free, f"{len(free)} blocks free, {self._num_free} counted"
        for block in self._blocks:
            expected = holders.get(block.block_id, 0)
            assert block.ref_count == expected, (
                f"block {block.block_id} has ref_count {block.ref_count}, held by {expected}"
            )
            assert (block.block_id in free) == (expected == 0)
            if block.content is not None:
                assert self._by_content.get(block.content) is block
        assert all(block.content == content for content, block in self._by_content.items())

    def _forget(self, block: Block) -> None:
        if block.content is not None:
            del self._by_content[block.content]
            block.content = None

    def _append_free(self, block: Block) -> None:
        last = self._tail.previous
        assert last is not None
        last.following, block.previous = block, last
        block.following, self._tail.previous = self._tail, block
        self._num_free += 1

    def _unlink(self, block: Block) -> None:
        assert block.previous is not None
        assert block.following is not None
        block.previous.following, block.following.previous = block.following, block.previous
        block.previous = block.following = None
        self._num_free -= 1
