"""Which blocks each sequence holds: prefix cache hits, growth, publishing, release."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.kv.block_pool import BlockPool
from engine.request import Sequence

ROOT = b""  # parent hash of a sequence's first block


def chained_hash(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """Content of a block: a hash of its tokens and all tokens before them, so that equal hashes
    mean equal prefixes. 128 bits, since a collision would show one user's text to another."""
    packed = b"".join(token.to_bytes(4, "little") for token in token_ids)
    return hashlib.blake2b(parent + packed, digest_size=16).digest()


@dataclass(slots=True)
class _Held:
    """Hash chain of one sequence's full blocks, and how many of them are published."""

    chain: list[bytes] = field(default_factory=list)
    num_published: int = 0


class KVManager:
    """Block bookkeeping of all running sequences. Of a `Sequence` it changes only `block_ids` and
    `num_planned_blocks`."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self._pool = BlockPool(num_blocks)
        self._block_size = block_size
        self._prefix_caching = prefix_caching
        self._held: dict[str, _Held] = {}
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # prompt tokens found

    @property
    def capacity(self) -> int:
        """Slots of all blocks together: the length of the longest sequence that can run."""
        return self._pool.num_blocks * self._block_size

    @property
    def usage(self) -> float:
        """Share of blocks held by running sequences, 0..1."""
        return 1 - self._pool.num_free / self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks without a holder."""
        return self._pool.num_free

    def blocks_for(self, num_slots: int) -> int:
        return -(-num_slots // self._block_size)

    def start(
        self, seq: Sequence, num_slots: int, *, match: bool, spare: int = 0, lookahead: int = 0
    ) -> int | None:
        """Give a sequence its first blocks: cached ones for its prefix, new ones up to `num_slots`
        after the hit, and for `lookahead` slots after those.

        Returns the number of tokens found in the cache, or None (nothing changed) if fewer than
        `spare` free blocks would remain. At least one token is always left to compute.
        """
        assert not seq.block_ids
        held = _Held()
        hits = self._matching_blocks(seq, held) if match and self._prefix_caching else 0
        cached = hits * self._block_size
        end = min(cached + num_slots, len(seq.token_ids)) + lookahead
        needed = self.blocks_for(end) - hits
        revived = sum(self._pool.is_free(content) for content in held.chain[:hits])
        if needed + revived + spare > self._pool.num_free:
            return None
        if match and self._prefix_caching:
            self.prefix_queries += len(seq.token_ids)
            self.prefix_hits += cached
        for content in held.chain[:hits]:
            block_id = self._pool.share(content)
            assert block_id is not None
            seq.block_ids.append(block_id)
        seq.block_ids += [self._pool.take() for _ in range(needed)]
        held.num_published = hits
        self._held[seq.request_id] = held
        return cached

    def reserve(self, seq: Sequence, num_slots: int) -> bool:
        """Grow the sequence's blocks to cover `num_slots` slots; False, and no growth, if the free
        blocks do not suffice."""
        needed = self.blocks_for(num_slots) - len(seq.block_ids)
        if needed > self._pool.num_free:
            return False
        for _ in range(needed):
            seq.block_ids.append(self._pool.take())
        return True

    def trim(self, seq: Sequence, num_slots: int) -> None:
        """Give back the blocks after the first `num_slots` slots: nothing in them is needed."""
        while len(seq.block_ids) > self.blocks_for(num_slots):
            self._pool.give_back(seq.block_ids.pop())
        seq.num_planned_blocks = min(seq.num_planned_blocks, len(seq.block_ids))

    def publish(self, seq: Sequence) -> None:
        """Make blocks whose tokens are all computed findable for other prompts."""
        if not self._prefix_caching:
            return
        held = self._held[seq.request_id]
        full = seq.num_computed // self._block_size
        for index in range(held.num_published, full):
            self._pool.publish(seq.block_ids[index], self._content(seq, held, index))
        held.num_published = max(held.num_published, full)

    def forget(self, seq: Sequence) -> None:
        """Make the sequence's blocks unfindable for other prompts. It must be released next."""
        for block_id in seq.block_ids:
            self._pool.forget(block_id)

    def release(self, seq: Sequence) -> None:
        """Give all blocks back, the last one first, so that the start of a prefix is evicted
        last."""
        for block_id in reversed(seq.block_ids):
            self._pool.give_back(block_id)
        seq.block_ids, seq.num_planned_blocks = [], 0
        self._held.pop(seq.request_id, None)

    def audit(self, running: Iterable[Sequence]) -> None:
        """Assert that the blocks of the running sequences are exactly the blocks in use."""
        holders: dict[int, int] = {}
        for seq in running:
            for block_id in seq.block_ids:
                holders[block_id] = holders.get(block_id, 0) + 1
        self._pool.audit(holders)

    def _matching_blocks(self, seq: Sequence, held: _Held) -> int:
        """How many leading blocks are in the cache; the last token is never looked up."""
        most = (len(seq.token_ids) - 1) // self._block_size
        for index in range(most):
            if not self._pool.contains(self._content(seq, held, index)):
                return index
        return most

    def _content(self, seq: Sequence, held: _Held, index: int) -> bytes:
        """Chained hash of block `index`; each block is hashed once."""
        if index == len(held.chain):
            start = index * self._block_size
            tokens = seq.token_ids[start : start + self._block_size]
            held.chain.append(chained_hash(held.chain[-1] if held.chain else ROOT, tokens))
        return held.chain[index]
