"""Which blocks each sequence holds: prefix cache hits, growth, publishing, release."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Collection, Iterable, Iterator

from engine.kv.block_pool import BlockPool
from engine.request import Sequence

ROOT = b""  # parent hash of a sequence's first block, without a salt


def chained_hash(parent: bytes, token_ids: Collection[int]) -> bytes:
    """Content of a block: a hash of its tokens and all tokens before them, so that equal hashes
    mean equal prefixes. 128 bits, since a collision would show one user's text to another."""
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return hashlib.blake2b(parent + packed, digest_size=16).digest()


def root_of(salt: str) -> bytes:
    """Parent hash of a first block: sequences with different salts have no content in common."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest() if salt else ROOT


class KVManager:
    """Block bookkeeping of all running sequences. Of a `Sequence` it changes only what concerns
    blocks and their hashes."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self._pool = BlockPool(num_blocks)
        self._block_size = block_size
        self._prefix_caching = prefix_caching
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0  # prompt tokens found

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._block_size

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
        hits = self._matching_blocks(seq) if match and self._prefix_caching else 0
        cached = hits * self._block_size
        end = min(cached + num_slots, len(seq.token_ids)) + lookahead
        needed = self.blocks_for(end) - hits
        revived = self._pool.count_free(self._contents(seq, hits))
        seq.num_lacking_blocks = needed + revived + spare - self._pool.num_free
        if seq.num_lacking_blocks > 0:
            return None
        if match and self._prefix_caching:
            self.prefix_queries += len(seq.token_ids)
            self.prefix_hits += cached
        for content in self._contents(seq, hits):
            block_id = self._pool.share(content)
            assert block_id is not None
            seq.block_ids.append(block_id)
        seq.block_ids += [self._pool.take() for _ in range(needed)]
        seq.num_published_blocks = hits
        return cached

    def hash_prefix(self, seq: Sequence, at_most: int) -> bool:
        """Hash up to `at_most` more blocks of a sequence, as far as they are in the cache. Whether
        `start` then has none left to hash."""
        if not self._prefix_caching:
            return True
        most = self._most_matching(seq)
        known = self._num_hashed(seq)
        for index in range(max(0, known - 1), min(most, known + at_most)):
            if not self._pool.contains(self._content(seq, index)):
                return True
        return known + at_most >= most

    def may_match_more(self, seq: Sequence) -> bool:
        """Whether more of the prefix of a sequence is in the cache than when it was last looked up.
        Looks at one block."""
        index = seq.num_matched_blocks
        if not self._prefix_caching or index >= self._most_matching(seq):
            return False
        return self._pool.contains(self._content(seq, index))

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
        full = seq.num_computed // self._block_size
        for index in range(seq.num_published_blocks, full):
            self._pool.publish(seq.block_ids[index], self._content(seq, index))
        seq.num_published_blocks = max(seq.num_published_blocks, full)

    def forget(self, seq: Sequence) -> None:
        """Make the sequence's blocks unfindable for other prompts. It must be released next."""
        for block_id in seq.block_ids:
            self._pool.forget(block_id)

    def release(self, seq: Sequence) -> None:
        """Give all blocks back, the last one first, so that the start of a prefix is evicted
        last."""
        for block_id in reversed(seq.block_ids):
            self._pool.give_back(block_id)
        seq.block_ids, seq.num_planned_blocks, seq.num_published_blocks = [], 0, 0

    def audit(self, running: Iterable[Sequence]) -> None:
        """Assert that the blocks of the running sequences are exactly the blocks in use."""
        holders: dict[int, int] = {}
        for seq in running:
            for block_id in seq.block_ids:
                holders[block_id] = holders.get(block_id, 0) + 1
        self._pool.audit(holders)

    def _matching_blocks(self, seq: Sequence) -> int:
        """How many leading blocks are in the cache; the last token is never looked up."""
        most = self._most_matching(seq)
        num_known = min(most, self._num_hashed(seq))
        found = self._pool.count_leading(self._contents(seq, num_known))
        if found == num_known:
            while found < most and self._pool.contains(self._content(seq, found)):
                found += 1
        seq.num_matched_blocks = found
        return found

    def _num_hashed(self, seq: Sequence) -> int:
        """How many of its leading blocks have hashes."""
        return len(seq.prompt_hashes) + len(seq.output_hashes)

    def _most_matching(self, seq: Sequence) -> int:
        return (len(seq.token_ids) - 1) // self._block_size

    def _contents(self, seq: Sequence, count: int) -> Iterator[bytes]:
        """Hashes of the first `count` blocks, which are all known."""
        return itertools.islice(itertools.chain(seq.prompt_hashes, seq.output_hashes), count)

    def _content(self, seq: Sequence, index: int) -> bytes:
        """Chained hash of block `index`, after all before it. Each block is hashed once, those of a
        prompt once for all its choices."""
        num_shared = seq.num_prompt // self._block_size
        chain, first = seq.prompt_hashes, 0
        if index >= num_shared:
            chain, first = seq.output_hashes, num_shared
        if index - first == len(chain):
            salt = seq.request.cache_salt
            parent = self._content(seq, index - 1) if index else root_of(salt)
            start = index * self._block_size
            chain.append(chained_hash(parent, seq.token_ids[start : start + self._block_size]))
        return chain[index - first]
