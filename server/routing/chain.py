"""The key of a prompt for routing: what the prefix cache of an engine would look up."""

from __future__ import annotations

from collections.abc import Sequence

from engine.kv.manager import chained_hash, root_of


def prefix_chain(token_ids: Sequence[int], salt: str, block_size: int) -> tuple[bytes, ...]:
    """Chained hashes of the full blocks of a prompt that an engine may find in its prefix cache:
    not the block with the last token, which is always computed."""
    found: list[bytes] = []
    parent = root_of(salt)
    for start in range(0, len(token_ids) - block_size, block_size):
        parent = chained_hash(parent, token_ids[start : start + block_size])
        found.append(parent)
    return tuple(found)
